//! `warren-bench`: the benchmarks behind `cargo xtask bench`.

fn main() {}
