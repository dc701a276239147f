"""Says hello at `/`, and answers with the request's body at `/echo`."""

from componentize_py_types import Err, Ok
from wit_world import exports
from wit_world.imports.streams import InputStream, StreamError_Closed
from wit_world.imports.types import (
    Fields,
    IncomingRequest,
    OutgoingBody,
    OutgoingResponse,
    ResponseOutparam,
)

# As many bytes as a stream takes at once.
CHUNK = 4096


class IncomingHandler(exports.IncomingHandler):
    def handle(self, request: IncomingRequest, response_out: ResponseOutparam) -> None:
        match request.path_with_query():
            case "/":
                send(response_out, 200, [b"hello from Python\n"])
            case "/echo":
                with request.consume() as body, body.stream() as stream:
                    send(response_out, 200, chunks(stream))
            case _:
                send(response_out, 404, [b"not found\n"])


def chunks(stream: InputStream):
    """What the stream has, until its end."""
    while True:
        try:
            yield stream.blocking_read(CHUNK)
        except Err as error:
            if isinstance(error.value, StreamError_Closed):
                return
            raise


def send(response_out: ResponseOutparam, status: int, chunks) -> None:
    response = OutgoingResponse(Fields())
    response.set_status_code(status)
    body = response.body()
    ResponseOutparam.set(response_out, Ok(response))
    with body.write() as stream:
        for chunk in chunks:
            stream.blocking_write_and_flush(chunk)
    OutgoingBody.finish(body, None)
