//! Requests and answers.

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::caller::{Caller, request};
use super::common::kvm;
use super::{Function, stop};

#[tokio::test]
async fn calls_follow_each_other_on_one_connection_and_on_several() {
    if !kvm() {
        return;
    }
    let (function, mut connections) = (Function::new(), Vec::new());
    let host = function.host().await;
    let microvm = host.running(1).await;
    for _ in 0..4 {
        connections.push(Caller::new(microvm.path()).await);
    }
    for round in 0..5 {
        for (index, caller) in connections.iter_mut().enumerate() {
            let calls = round * 4 + index + 1;
            assert_eq!(caller.get("/calls").await.text(), format!("{calls} 1"));
        }
    }
    // All at once: each gets its own answer.
    for (index, caller) in connections.iter_mut().enumerate() {
        caller.send(request("GET", &format!("/request?{index}"), "")).await;
    }
    for (index, caller) in connections.iter_mut().enumerate() {
        let answer = caller.answer().await.unwrap();
        assert_eq!(answer.text(), format!("get false function {index}"));
    }
    // One behind the other, without waiting for answers; one of them in pieces.
    let caller = &mut connections[0];
    let body = "content-length: 5\r\n";
    caller.send([request("POST", "/echo", body), "hello".into()].concat().repeat(3)).await;
    let last = request("GET", "/status?404", "");
    let (first, second) = last.split_at(9);
    caller.send(first).await;
    for _ in 0..3 {
        assert_eq!(caller.answer().await.unwrap().text(), "hello");
    }
    caller.send(second).await;
    assert_eq!(caller.answer().await.unwrap().status, 404);
    // The last one.
    caller.send(request("GET", "/calls", "connection: close\r\n")).await;
    assert_eq!(caller.answer().await.unwrap().field("connection"), Some("close"));
    connections.remove(0).ends().await;
    stop(microvm).await;
}

#[tokio::test]
async fn methods_and_fields_are_what_they_are() {
    if !kvm() {
        return;
    }
    let function = Function::new();
    let host = function.host().await;
    let microvm = host.running(1).await;
    let mut caller = Caller::new(microvm.path()).await;
    for (method, known) in [("DELETE", "delete"), ("PURGE", "other PURGE")] {
        caller.send(request(method, "/request?a=b", "x-forwarded-proto: https\r\n")).await;
        let answer = caller.answer().await.unwrap();
        assert_eq!(answer.text(), format!("{known} true function a=b"));
    }
    caller.send(request("GET", "/fields", "X-Two: 1\r\nx-two: 2\r\n")).await;
    let answer = caller.answer().await.unwrap();
    assert!(answer.text().to_lowercase().contains("x-two=1\nx-two=2\n"), "{answer:?}");
    assert_eq!(
        answer.fields.iter().filter(|(name, _)| name.eq_ignore_ascii_case("x-own")).count(),
        2
    );
    // A HEAD's answer has no body, whatever it says of one; nor has one of status 204.
    for target in ["/zeroes?100", "/zeroes?200000", "/length?5"] {
        caller.send(request("HEAD", target, "")).await;
        assert_eq!(caller.head().await.unwrap().status, 200);
    }
    assert_eq!(caller.get("/length?5").await.text(), "hello");
    caller.send(request("GET", "/status?204", "")).await;
    assert_eq!(caller.head().await.unwrap().status, 204);
    // Trailers.
    let chunked = "transfer-encoding: chunked\r\ntrailer: x-sum\r\n";
    caller.send(request("POST", "/trailers", chunked) + "3\r\nabc\r\n0\r\nx-sum: 7\r\n\r\n").await;
    let answer = caller.answer().await.unwrap();
    assert_eq!(answer.text(), "before trailers");
    assert_eq!(answer.trailers, [("x-sum".to_owned(), "7".to_owned())]);
    caller.get("/error").await.is_error(500, "function");
    caller.ends().await;
    stop(microvm).await;
}

/// An answer that is whole at once says its length; one that takes longer comes as it is made.
#[tokio::test]
async fn answers_come_as_they_are_made() {
    if !kvm() {
        return;
    }
    let function = Function::new();
    let host = function.host().await;
    let microvm = host.running(1).await;
    let mut caller = Caller::new(microvm.path()).await;
    assert_eq!(caller.get("/calls").await.field("content-length"), Some("3"));
    for bytes in [0, 1, 65_535, 65_536, 65_537, 1 << 20] {
        let answer = caller.get(&format!("/zeroes?{bytes}")).await;
        assert!(answer.body == vec![0; bytes], "{bytes}");
    }
    caller.send(request("GET", "/slowly?3", "")).await;
    assert_eq!(caller.head().await.unwrap().field("transfer-encoding"), Some("chunked"));
    for number in 0..3 {
        assert_eq!(caller.chunk().await.unwrap(), format!("piece {number}\n").as_bytes());
    }
    assert!(caller.chunk().await.unwrap().is_empty());
    assert_eq!(caller.line().await.unwrap(), "");
    // Each piece comes back before the next is sent.
    caller.send(request("POST", "/echo", "transfer-encoding: chunked\r\n")).await;
    for piece in ["first", "the second"] {
        // The size in two parts: who polls must wait for the rest of it.
        let chunk = format!("{:x}\r\n{piece}\r\n", piece.len());
        caller.send(&chunk[..1]).await;
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        caller.send(&chunk[1..]).await;
        if piece == "first" {
            assert_eq!(caller.head().await.unwrap().status, 200);
        }
        assert_eq!(caller.chunk().await.unwrap(), piece.as_bytes());
    }
    caller.send("0\r\n\r\n").await;
    assert!(caller.chunk().await.unwrap().is_empty());
    stop(microvm).await;
}

#[tokio::test]
async fn three_mib_stream_both_ways_at_once() {
    if !kvm() {
        return;
    }
    let function = Function::new();
    let host = function.host().await;
    let microvm = host.running(1).await;
    let body: Vec<u8> = (0..3 << 20).map(|n: u32| (n % 251) as u8).collect();
    for target in ["/echo", "/echo-body-first"] {
        let caller = Caller::new(microvm.path()).await;
        let (mut read, mut write) = caller.split();
        let head = request(
            "POST",
            target,
            &format!("content-length: {}\r\nconnection: close\r\n", body.len()),
        );
        let sent = body.clone();
        let sender = tokio::spawn(async move {
            write.write_all(head.as_bytes()).await.unwrap();
            for piece in sent.chunks(10_001) {
                write.write_all(piece).await.unwrap();
            }
            write
        });
        // In small reads, so that both ends wait for each other.
        let (mut came, mut piece) = (Vec::new(), [0; 1000]);
        while let Ok(length @ 1..) = read.read(&mut piece).await {
            came.extend_from_slice(&piece[..length]);
        }
        drop(sender.await.unwrap());
        let head = came.windows(4).position(|end| end == b"\r\n\r\n").unwrap() + 4;
        let came = if came[..head].windows(7).any(|part| part == b"chunked") {
            without_chunks(&came[head..])
        } else {
            came.split_off(head)
        };
        assert!(came == body, "{target}: {} bytes", came.len());
    }
    stop(microvm).await;
}

fn without_chunks(mut bytes: &[u8]) -> Vec<u8> {
    let mut body = Vec::new();
    loop {
        let line = bytes.windows(2).position(|end| end == b"\r\n").unwrap();
        let size = usize::from_str_radix(std::str::from_utf8(&bytes[..line]).unwrap(), 16).unwrap();
        if size == 0 {
            return body;
        }
        body.extend_from_slice(&bytes[line + 2..line + 2 + size]);
        bytes = &bytes[line + size + 4..];
    }
}

/// Who says it wrongly is told so; others are served.
#[tokio::test]
async fn malformed_requests_are_refused_and_concern_nobody_else() {
    if !kvm() {
        return;
    }
    let function = Function::new();
    let host = function.host().await;
    let microvm = host.running(1).await;
    let mut neighbour = Caller::new(microvm.path()).await;
    let both = "content-length: 3\r\ntransfer-encoding: chunked\r\n";
    let cases = [
        "garbage\r\n\r\n".to_owned(),
        "GET / HTTP/1.0\r\n\r\n".to_owned(),
        "GET / HTTP/1.1\r\nno colon\r\n\r\n".to_owned(),
        "\x16\x03\x01 this is TLS\r\n\r\n".to_owned(),
        request("POST", "/echo", both),
        request("POST", "/echo", "content-length: 3\r\ncontent-length: 4\r\n"),
        request("POST", "/echo", "content-length: +3\r\n"),
        request("POST", "/echo", "content-length: 99999999999999999999\r\n"),
        request("POST", "/echo", "transfer-encoding: gzip, chunked\r\n"),
        request("GET", "/echo", "upgrade: websocket\r\nconnection: upgrade\r\n"),
        request("GET", "/calls", &"x: y\r\n".repeat(200)),
        // Its end never comes.
        format!("GET /calls HTTP/1.1\r\nx: {}", "y".repeat(70_000)),
    ];
    for case in cases {
        let mut caller = Caller::new(microvm.path()).await;
        caller.send(&case).await;
        let answer = caller.answer().await;
        answer.unwrap_or_else(|error| panic!("{error} to {case:.60?}")).is_error(400, "malformed");
        caller.ends().await;
        assert_eq!(neighbour.get("/ignore").await.text(), "ignored");
    }
    // Bodies that are none: the function sees that, whatever it answers.
    for chunks in ["zz\r\n", "3\r\nabcX\r\n", "fffffffffffffffff\r\n", "0\r\nno colon\r\n\r\n"] {
        let mut caller = Caller::new(microvm.path()).await;
        let head = request("POST", "/echo-body-first", "transfer-encoding: chunked\r\n");
        caller.send(head + chunks).await;
        assert_eq!(caller.answer().await.unwrap().status, 400, "{chunks:?}");
        caller.ends().await;
        assert_eq!(neighbour.get("/ignore").await.text(), "ignored");
    }
    stop(microvm).await;
}

#[tokio::test]
async fn who_goes_away_is_forgotten() {
    if !kvm() {
        return;
    }
    let function = Function::new();
    let host = function.host().await;
    let microvm = host.running(1).await;
    let mut log = Caller::to(microvm.path(), 514).await;
    // In the middle of a head, of a body, and of an answer.
    let mut caller = Caller::new(microvm.path()).await;
    caller.send("GET /calls HTTP").await;
    drop(caller);
    let mut caller = Caller::new(microvm.path()).await;
    caller.send(request("POST", "/echo-body-first", "content-length: 10\r\n") + "half ").await;
    drop(caller);
    let mut caller = Caller::new(microvm.path()).await;
    caller.send(request("GET", "/slowly?1000", "")).await;
    caller.head().await.unwrap();
    drop(caller);
    assert!(log.line().await.unwrap().ends_with(" the caller is gone"));
    let mut caller = Caller::new(microvm.path()).await;
    assert_eq!(caller.get("/calls").await.text(), "1 1");
    stop(microvm).await;
}

/// A connection lives on when the rest of a body is small and there; else it is closed, after the answer.
#[tokio::test]
async fn bodies_that_nobody_reads_are_no_requests() {
    if !kvm() {
        return;
    }
    let function = Function::new();
    let host = function.host().await;
    let microvm = host.running(1).await;
    let mut caller = Caller::new(microvm.path()).await;
    let hidden = request("GET", "/status?404", "");
    assert_eq!(caller.post("/ignore", hidden.as_bytes()).await.text(), "ignored");
    assert_eq!(caller.get("/calls").await.text(), "1 1");
    // Its body comes too late, or never.
    caller.send(request("POST", "/ignore", "content-length: 100000000\r\n")).await;
    assert_eq!(caller.answer().await.unwrap().text(), "ignored");
    caller.ends().await;
    // Who waits to be told to send it is told.
    let mut caller = Caller::new(microvm.path()).await;
    let expect = "expect: 100-continue\r\ncontent-length: 5\r\n";
    caller.send(request("POST", "/echo", expect)).await;
    assert_eq!(caller.head().await.unwrap().status, 100);
    caller.send("hello").await;
    assert_eq!(caller.answer().await.unwrap().text(), "hello");
    stop(microvm).await;
}

/// Answers that are not what they say: cut, so that nobody takes them for whole ones.
#[tokio::test]
async fn answers_that_are_not_whole_are_seen_to_be_cut() {
    if !kvm() {
        return;
    }
    let function = Function::new();
    let host = function.host().await;
    let microvm = host.running(1).await;
    for target in ["/unfinished", "/length?100", "/length?2", "/length?5,6"] {
        let mut caller = Caller::new(microvm.path()).await;
        caller.send(request("GET", target, "")).await;
        caller.answer().await.expect_err(target);
    }
    let mut caller = Caller::new(microvm.path()).await;
    caller.get("/no-answer").await.is_error(500, "no-answer");
    caller.ends().await;
    // The answer does not wait for what the function does afterwards.
    let mut log = Caller::to(microvm.path(), 514).await;
    let mut caller = Caller::new(microvm.path()).await;
    assert_eq!(caller.get("/on?and-on").await.text(), "answered");
    assert!(log.line().await.unwrap().ends_with("went on and-on"));
    assert_eq!(caller.get("/calls").await.text(), "1 1");
    stop(microvm).await;
}
