//! Redis commands, RESP2 (redis.io, "Redis serialization protocol specification").

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use warren_abi::probe::{Endpoint, Outcome, Timings};

use super::Failure;
use super::tcp::Connection;
use crate::machine::Machine;

/// The longest reply that is read, in bytes; all replies must fit an invocation's reply.
const REPLIES_MAX: usize = 512 * 1024;

/// How deep replies may nest.
const DEPTH_MAX: u32 = 8;

pub fn run(
    machine: &mut Machine,
    to: Endpoint,
    commands: &[Vec<String>],
    deadline: u64,
    timings: &mut Timings,
) -> Result<Outcome, Failure> {
    let mut connection = Connection::open(machine, to, deadline, timings)?;
    let mut replies = Vec::with_capacity(commands.len());
    let mut received = Vec::new();
    let mut total = 0;
    for command in commands {
        connection.send(&encode(command))?;
        let length = loop {
            if let Some(length) = reply_length(&received, 0)? {
                break length;
            }
            if total + received.len() > REPLIES_MAX {
                return Err("the server's replies are longer than 512 KiB".into());
            }
            if !connection.receive_into(&mut received)? {
                return Err("the server closed before its reply".into());
            }
            if timings.first_byte_ns == 0 {
                timings.first_byte_ns = connection.machine.now_ns();
            }
        };
        let rest = received.split_off(length);
        total += received.len();
        replies.push(core::mem::replace(&mut received, rest));
    }
    connection.finish();
    Ok(Outcome::Redis(replies))
}

fn encode(command: &[String]) -> Vec<u8> {
    let mut bytes = format!("*{}\r\n", command.len()).into_bytes();
    for argument in command {
        bytes.extend_from_slice(format!("${}\r\n{argument}\r\n", argument.len()).as_bytes());
    }
    bytes
}

/// Length of the reply that these bytes begin with, once it is whole.
fn reply_length(bytes: &[u8], depth: u32) -> Result<Option<usize>, Failure> {
    let malformed = || Failure::from("the server does not speak RESP2");
    let Some(line_end) = bytes.windows(2).position(|pair| pair == b"\r\n") else {
        return Ok(None);
    };
    let line = &bytes[..line_end];
    let after_line = line_end + 2;
    let (kind, argument) = line.split_first().ok_or_else(malformed)?;
    let number = || -> Result<Option<usize>, Failure> {
        let text = core::str::from_utf8(argument).map_err(|_| malformed())?;
        // -1 stands for null.
        if text == "-1" { Ok(None) } else { text.parse().map(Some).map_err(|_| malformed()) }
    };
    match kind {
        b'+' | b'-' | b':' => Ok(Some(after_line)),
        b'$' => {
            let Some(length) = number()? else { return Ok(Some(after_line)) };
            let end = length.checked_add(after_line + 2).ok_or_else(malformed)?;
            Ok((bytes.len() >= end).then_some(end))
        }
        b'*' if depth < DEPTH_MAX => {
            let mut end = after_line;
            for _ in 0..number()?.unwrap_or(0) {
                match reply_length(&bytes[end..], depth + 1)? {
                    Some(length) => end += length,
                    None => return Ok(None),
                }
            }
            Ok(Some(end))
        }
        _ => Err(malformed()),
    }
}
