// Says hello at `/`, and answers with the request's body at `/echo`.

#include <string.h>

#include "proxy.h"

// As many bytes as a stream takes at once.
enum { CHUNK = 4096 };

static bool is(const proxy_string_t *path, const char *other) {
    return path->len == strlen(other) && memcmp(path->ptr, other, path->len) == 0;
}

static bool write_chunk(wasi_io_streams_own_output_stream_t stream, proxy_list_u8_t *chunk) {
    wasi_io_streams_stream_error_t error;
    bool ok = wasi_io_streams_method_output_stream_blocking_write_and_flush(
        wasi_io_streams_borrow_output_stream(stream), chunk, &error);
    if (!ok) {
        wasi_io_streams_stream_error_free(&error);
    }
    return ok;
}

static bool write_text(wasi_io_streams_own_output_stream_t stream, const char *text) {
    proxy_list_u8_t chunk = {(uint8_t *)text, strlen(text)};
    return write_chunk(stream, &chunk);
}

// Copies until the input's end. False if either stream failed before.
static bool copy(wasi_io_streams_own_input_stream_t input,
                 wasi_io_streams_own_output_stream_t output) {
    proxy_list_u8_t chunk;
    wasi_io_streams_stream_error_t error;
    while (wasi_io_streams_method_input_stream_blocking_read(
        wasi_io_streams_borrow_input_stream(input), CHUNK, &chunk, &error)) {
        bool ok = write_chunk(output, &chunk);
        proxy_list_u8_free(&chunk);
        if (!ok) {
            return false;
        }
    }
    bool ended = error.tag == WASI_IO_STREAMS_STREAM_ERROR_CLOSED;
    wasi_io_streams_stream_error_free(&error);
    return ended;
}

static bool echo(wasi_http_types_own_incoming_request_t request,
                 wasi_io_streams_own_output_stream_t output) {
    wasi_http_types_own_incoming_body_t body;
    wasi_io_streams_own_input_stream_t input;
    wasi_http_types_method_incoming_request_consume(
        wasi_http_types_borrow_incoming_request(request), &body);
    wasi_http_types_method_incoming_body_stream(wasi_http_types_borrow_incoming_body(body), &input);
    bool ok = copy(input, output);
    wasi_io_streams_input_stream_drop_own(input);
    wasi_http_types_incoming_body_drop_own(body);
    return ok;
}

// Sends the response's head, and returns the body that is to follow.
static wasi_http_types_own_outgoing_body_t
begin(wasi_http_types_own_response_outparam_t out, uint16_t status) {
    wasi_http_types_own_outgoing_response_t response =
        wasi_http_types_constructor_outgoing_response(wasi_http_types_constructor_fields());
    wasi_http_types_borrow_outgoing_response_t borrowed =
        wasi_http_types_borrow_outgoing_response(response);
    wasi_http_types_own_outgoing_body_t body;
    wasi_http_types_method_outgoing_response_set_status_code(borrowed, status);
    wasi_http_types_method_outgoing_response_body(borrowed, &body);
    wasi_http_types_result_own_outgoing_response_error_code_t result = {.val.ok = response};
    wasi_http_types_static_response_outparam_set(out, &result);
    return body;
}

// Ends a body that is whole. One that is not is dropped, which whoever asked notices.
static void end(wasi_http_types_own_outgoing_body_t body, bool whole) {
    wasi_http_types_error_code_t error;
    if (!whole) {
        wasi_http_types_outgoing_body_drop_own(body);
    } else if (!wasi_http_types_static_outgoing_body_finish(body, NULL, &error)) {
        wasi_http_types_error_code_free(&error);
    }
}

void exports_wasi_http_incoming_handler_handle(
    exports_wasi_http_incoming_handler_own_incoming_request_t request,
    exports_wasi_http_incoming_handler_own_response_outparam_t out) {
    proxy_string_t path = {0};
    wasi_http_types_method_incoming_request_path_with_query(
        wasi_http_types_borrow_incoming_request(request), &path);
    bool hello = is(&path, "/");
    bool echoes = is(&path, "/echo");
    proxy_string_free(&path);

    wasi_http_types_own_outgoing_body_t body = begin(out, hello || echoes ? 200 : 404);
    wasi_io_streams_own_output_stream_t stream;
    wasi_http_types_method_outgoing_body_write(wasi_http_types_borrow_outgoing_body(body), &stream);
    bool whole = hello    ? write_text(stream, "hello from C\n")
                 : echoes ? echo(request, stream)
                          : write_text(stream, "not found\n");
    wasi_io_streams_output_stream_drop_own(stream);
    end(body, whole);
    wasi_http_types_incoming_request_drop_own(request);
}
