//! Datagrams to a server that sends them back.

use alloc::vec;

use smoltcp::socket::udp;
use smoltcp::wire::IpEndpoint;
use warren_abi::probe::{Endpoint, Outcome, Timings};

use super::{Failure, endpoint};
use crate::machine::Machine;
use crate::tcp::ephemeral_port;

/// What is sent, and how often.
pub struct Plan {
    pub count: u32,
    /// Bytes of payload.
    pub length: u16,
    /// 0: each when the one before came back.
    pub interval_us: u32,
}

/// How long a reply may take when the next datagram waits for it, in nanoseconds; then it counts as
/// lost.
const PATIENCE_NS: u64 = 1_000_000_000;

/// How long the replies after the last datagram may take, in nanoseconds.
const TAIL_NS: u64 = 300_000_000;

/// A bound UDP socket, closed when it is dropped.
pub struct Socket<'a> {
    pub machine: &'a mut Machine,
    server: IpEndpoint,
}

impl<'a> Socket<'a> {
    pub fn open(machine: &'a mut Machine, to: Endpoint) -> Result<Self, Failure> {
        let server = endpoint(to)?;
        let port = ephemeral_port(machine);
        let mut this = Self { machine, server };
        this.socket().bind(port).map_err(|_| Failure::from("no UDP port"))?;
        Ok(this)
    }

    fn socket(&mut self) -> &mut udp::Socket<'static> {
        self.machine.sockets.udp()
    }

    /// Queues a datagram; `false` if there is no room.
    pub fn send(&mut self, payload: &[u8]) -> bool {
        let server = self.server;
        self.socket().send_slice(payload, server).is_ok()
    }

    /// The next datagram from the server.
    pub fn receive<R>(&mut self, take: impl FnOnce(&[u8]) -> R) -> Option<R> {
        let server = self.server;
        while let Ok((payload, metadata)) = self.socket().recv() {
            if metadata.endpoint == server {
                return Some(take(payload));
            }
        }
        None
    }
}

impl Drop for Socket<'_> {
    fn drop(&mut self) {
        self.socket().close();
    }
}

pub fn echo(
    machine: &mut Machine,
    to: Endpoint,
    plan: &Plan,
    deadline: u64,
    timings: &mut Timings,
) -> Result<Outcome, Failure> {
    if !(8..=1400).contains(&plan.length) || plan.count > 1 << 22 {
        return Err("a datagram has 8 to 1400 bytes, and at most 2^22 are sent".into());
    }
    let mut socket = Socket::open(machine, to)?;
    // Which came back already: each counts once.
    let mut seen = vec![0u64; (plan.count as usize).div_ceil(64)];
    let mut payload = vec![0; usize::from(plan.length)];
    let (mut sent, mut received, mut longest_gap_ns) = (0, 0, 0);
    let mut last_reply_ns = 0;
    let mut next_send_ns = socket.machine.now_ns();
    while received < plan.count {
        let now = socket.machine.now_ns();
        if now >= deadline || (sent == plan.count && now >= next_send_ns) {
            break;
        }
        if sent < plan.count && now >= next_send_ns {
            payload[..8].copy_from_slice(&u64::from(sent).to_be_bytes());
            if socket.send(&payload) {
                sent += 1;
                next_send_ns = match plan.interval_us {
                    _ if sent == plan.count => now + TAIL_NS.max(PATIENCE_NS),
                    0 => now + PATIENCE_NS,
                    interval => next_send_ns + u64::from(interval) * 1000,
                };
                if plan.interval_us > 0 && sent == plan.count {
                    next_send_ns = now + TAIL_NS;
                }
                // More may be due already.
                continue;
            }
        }
        socket.machine.wait(next_send_ns.min(deadline));
        while let Some(number) = socket.receive(sequence_number) {
            let Some(number) = number.filter(|&number| number < u64::from(sent)) else { continue };
            let (word, bit) = ((number / 64) as usize, 1 << (number % 64));
            if seen[word] & bit != 0 {
                continue;
            }
            seen[word] |= bit;
            received += 1;
            let now = socket.machine.now_ns();
            if timings.first_byte_ns == 0 {
                timings.first_byte_ns = now;
            } else {
                longest_gap_ns = longest_gap_ns.max(now - last_reply_ns);
            }
            last_reply_ns = now;
            if plan.interval_us == 0 && sent < plan.count {
                next_send_ns = now;
            }
        }
    }
    Ok(Outcome::Udp { sent, received, longest_gap_ns })
}

fn sequence_number(payload: &[u8]) -> Option<u64> {
    payload.first_chunk().map(|bytes| u64::from_be_bytes(*bytes))
}
