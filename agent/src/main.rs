//! `warren-agent`: see the library.

fn main() {
    warren_agent::main();
}
