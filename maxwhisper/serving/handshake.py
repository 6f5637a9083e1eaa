"""How a connection of `/v1/realtime` begins."""

import json

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.http11 import Request

from .errors import APIError

HEADERS = ("connection", "sec-websocket-", "upgrade")
"""What the names of a handshake's headers begin with."""


class Handshake(WebSocketsSansIOProtocol):
    """Refuses a handshake that is not ASCII, which websockets itself fails at: some clients would see a status of 500,
    and others no more than the end of the connection."""

    def handle_connect(self, event: Request) -> None:
        """Answers the first request of a connection."""
        for name, value in event.headers.raw_items():
            if name.lower().startswith(HEADERS) and not value.isascii():
                self._refuse(APIError(400, f"the header {name} is not ASCII"))
                return
        super().handle_connect(event)

    def _refuse(self, error: APIError) -> None:
        response = self.conn.reject(error.status, json.dumps(error.body))
        del response.headers["Content-Type"]
        response.headers["Content-Type"] = "application/json"
        self.conn.send_response(response)
        self.handshake_complete = self.close_sent = True
        self.transport.write(b"".join(self.conn.data_to_send()))
        self.transport.close()
