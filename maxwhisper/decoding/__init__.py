"""From audio features to text: openai-whisper's loop, and the graphs that take its steps."""
