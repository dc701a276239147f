// Says hello at `/`, and answers with the request's body at `/echo`.

addEventListener("fetch", (event) => event.respondWith(answer(event.request)));

async function answer(request) {
  switch (new URL(request.url).pathname) {
    case "/":
      return new Response("hello from JavaScript\n");
    case "/echo":
      return new Response(await request.arrayBuffer());
    default:
      return new Response("not found\n", { status: 404 });
  }
}
