"""OpenAI's audio interface over HTTP: `maxwhisper serve`, of the extra `serve`.

`app` has the routes, `fields` what a request may hold, `body` how it is read, `handshake` how a connection begins,
`jobs` the threads that transcribe, and `answers` the formats of what is returned. Transcripts are those of
`Whisper.transcribe`.
"""
