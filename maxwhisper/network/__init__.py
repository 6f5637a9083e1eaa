"""Whisper's network as MAX graphs, and the table of its blocks."""
