//! One DNS query over UDP.

use alloc::vec;
use alloc::vec::Vec;

use rand_chacha::rand_core::Rng;
use smoltcp::wire::{
    DnsFlags, DnsOpcode, DnsPacket, DnsQueryType, DnsQuestion, DnsRecord, DnsRecordData, DnsRepr,
};
use warren_abi::probe::{Endpoint, Outcome, Timings};

use super::Failure;
use super::udp::Socket;
use crate::machine::Machine;

/// Time from one query to the next when no reply comes, in nanoseconds.
const RETRY_NS: u64 = 1_000_000_000;

pub fn query(
    machine: &mut Machine,
    to: Endpoint,
    name: &str,
    deadline: u64,
    timings: &mut Timings,
) -> Result<Outcome, Failure> {
    let transaction_id = machine.random.next_u32() as u16;
    let query = encode(transaction_id, name)?;
    let mut socket = Socket::open(machine, to)?;
    let mut next_send_ns = socket.machine.now_ns();
    loop {
        let now = socket.machine.now_ns();
        if now >= next_send_ns && socket.send(&query) {
            next_send_ns = now + RETRY_NS;
        }
        if now >= deadline {
            return Err(Failure::Timeout);
        }
        socket.machine.wait(next_send_ns.min(deadline));
        while let Some(answer) = socket.receive(|reply| addresses(reply, transaction_id)) {
            // Replies to other queries, or garbage, are not for us.
            if let Some(addresses) = answer {
                timings.first_byte_ns = socket.machine.now_ns();
                return addresses.map(Outcome::Dns);
            }
        }
    }
}

fn encode(transaction_id: u16, name: &str) -> Result<Vec<u8>, Failure> {
    let mut wire_name = Vec::with_capacity(name.len() + 2);
    for label in name.trim_end_matches('.').split('.') {
        if label.is_empty() || label.len() > 63 {
            return Err("a label of the name is empty or longer than 63 bytes".into());
        }
        wire_name.push(label.len() as u8);
        wire_name.extend_from_slice(label.as_bytes());
    }
    wire_name.push(0);
    if wire_name.len() > 255 {
        return Err("the name is longer than 255 bytes".into());
    }
    let query = DnsRepr {
        transaction_id,
        opcode: DnsOpcode::Query,
        flags: DnsFlags::RECURSION_DESIRED,
        question: DnsQuestion { name: &wire_name, type_: DnsQueryType::A },
    };
    let mut bytes = vec![0; query.buffer_len()];
    query.emit(&mut DnsPacket::new_unchecked(&mut bytes));
    Ok(bytes)
}

/// The addresses in a reply, or the server's refusal; `None` if it is not a reply to this query.
fn addresses(reply: &[u8], transaction_id: u16) -> Option<Result<Vec<[u8; 4]>, Failure>> {
    let packet = DnsPacket::new_checked(reply).ok()?;
    if packet.transaction_id() != transaction_id || !packet.flags().contains(DnsFlags::RESPONSE) {
        return None;
    }
    let code = u8::from(packet.rcode());
    if code != 0 {
        return Some(Err(Failure::Other(alloc::format!("the server answered with code {code}"))));
    }
    let mut rest = packet.payload();
    for _ in 0..packet.question_count() {
        (rest, _) = DnsQuestion::parse(rest).ok()?;
    }
    let mut addresses = Vec::new();
    for _ in 0..packet.answer_record_count() {
        let (after, record) = DnsRecord::parse(rest).ok()?;
        if let DnsRecordData::A(address) = record.data {
            addresses.push(address.octets());
        }
        rest = after;
    }
    Some(Ok(addresses))
}
