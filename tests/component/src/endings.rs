//! How a call ends that does not end well.

use std::hint::black_box;
use std::io::Write;

use wasip2::cli::exit::exit;
use wasip2::clocks::monotonic_clock;
use wasip2::http::types::ResponseOutparam;

use crate::answer::{Answer, text};

pub fn end(out: ResponseOutparam, how: &str) {
    match how {
        "trap" => trap(),
        "trap-in-answer" => {
            let mut answer = Answer::begin(out, 200, &[]);
            assert!(answer.send(b"a part"));
            // Nothing is kept back of an answer while the function waits.
            monotonic_clock::subscribe_duration(10_000_000).block();
            trap();
        }
        "trap-before-anything-was-sent" => {
            let mut answer = Answer::begin(out, 200, &[]);
            answer.stream.write_all(b"a part").unwrap();
            trap();
        }
        "trap-after-answer" => {
            text(out, 200, "whole");
            trap();
        }
        "stack-overflow" => text(out, 200, &descend(u64::MAX).to_string()),
        "deep" => text(out, 200, &descend(3_000).to_string()),
        "loop" => loop {
            black_box(());
        },
        "wait" => monotonic_clock::subscribe_duration(3_600_000_000_000).block(),
        "wait-in-answer" => {
            let mut answer = Answer::begin(out, 200, &[]);
            assert!(answer.send(b"a part"));
            monotonic_clock::subscribe_duration(3_600_000_000_000).block();
            answer.finish(None);
        }
        "memory" => {
            let mut pages = 0;
            while core::arch::wasm32::memory_grow(0, 1) != usize::MAX {
                pages += 1;
            }
            text(out, 200, &pages.to_string());
        }
        "memory-bomb" => {
            let mut held = Vec::new();
            loop {
                held.push(black_box(vec![1u8; 1 << 20]));
            }
        }
        "exit" => exit(Err(())),
        other => text(out, 404, other),
    }
}

#[inline(never)]
pub fn trap() {
    outer_of_the_trap(1);
}

#[inline(never)]
fn outer_of_the_trap(depth: u32) {
    inner_of_the_trap(black_box(depth));
    black_box(());
}

#[inline(never)]
fn inner_of_the_trap(depth: u32) {
    if black_box(depth) > 0 {
        core::arch::wasm32::unreachable();
    }
}

/// Each level has its place on the stack; the last asks the host for something.
#[inline(never)]
fn descend(levels: u64) -> u64 {
    if levels == 0 {
        return monotonic_clock::resolution();
    }
    black_box(descend(black_box(levels - 1))) + 1
}
