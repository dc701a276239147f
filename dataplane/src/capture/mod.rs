//! What a slot sends and receives, on both sides of the NAT.
//!
//! Inside is the slot's TAP; outside is the underlay's interface, whose packets of the VPC's tunnel
//! the kernel passes on and [`sides`] tells apart by who claimed their flow. Both are packet
//! sockets, which see frames before the programs at ingress and after those at egress: packets go
//! their way as they would without.

mod filter;
mod sides;
mod socket;

use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::OwnedSemaphorePermit;
use tokio::sync::mpsc::Sender;
use tokio::time::{Instant, MissedTickBehavior};
use tonic::Status;
use warren_proto::v1;

use crate::datapath::{self, HostDatapath};

pub use self::filter::{Filter, InvalidFilter};
pub(crate) use self::socket::link_address;
pub use self::socket::{PacketSocket, Received};

/// Bytes of the kernel's in which packets of each side wait.
const ROOM: usize = 4 << 20;
/// Most bytes of a frame: an IP packet of any length, and what is before it.
const FRAME_MAX: usize = 1 << 17;
/// A message is full with so many bytes, or when so many packets were looked at.
const MESSAGE_BYTES: usize = 256 << 10;
const MESSAGE_FRAMES: u32 = 1024;
/// How often one looks whether the instance is still there, and tells what was lost.
const TICK: Duration = Duration::from_millis(250);

/// Why a capture cannot begin or go on.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    /// A packet socket failed.
    #[error("cannot capture: {0}")]
    Socket(#[from] io::Error),
    /// The data path failed.
    #[error(transparent)]
    Datapath(#[from] datapath::Error),
    /// The filter is none.
    #[error(transparent)]
    Filter(#[from] InvalidFilter),
}

/// What is captured.
#[derive(Debug)]
pub struct Subject {
    /// Number of the slot.
    pub slot: u32,
    /// What it is attached to: the capture ends with that.
    pub attachment: datapath::Attachment,
    /// Which packets.
    pub filter: Filter,
    /// Most packets; none: no limit.
    pub count: Option<u64>,
    /// Longest time; none: no limit.
    pub time: Option<Duration>,
}

/// A capture that goes on while [`Capture::run`] does.
pub struct Capture {
    datapath: Arc<HostDatapath>,
    number: u32,
    slot: sides::Slot,
    end: IpAddr,
    filter: Filter,
    left: u64,
    deadline: Option<Instant>,
    inside: Side,
    outside: Side,
    buffer: Vec<u8>,
    /// One of those that may be at a time.
    _permit: OwnedSemaphorePermit,
}

struct Side {
    socket: AsyncFd<PacketSocket>,
    lost: u64,
}

impl Side {
    fn open(ifindex: u32, filter: Option<&Filter>) -> io::Result<Self> {
        let socket = PacketSocket::open(ifindex, filter, ROOM)?;
        // SAFETY: it owns its descriptor, has no other, and closes it only when it is dropped.
        let socket = unsafe { AsyncFd::register_with_interest(socket, Interest::READABLE) };
        let socket = socket.map_err(io::Error::from)?;
        Ok(Self { socket, lost: 0 })
    }

    /// How many were lost so far.
    fn lost(&mut self) -> io::Result<u64> {
        self.lost += u64::from(self.socket.get_ref().take_lost()?);
        Ok(self.lost)
    }

    /// Waits for more, after nothing was there.
    async fn more(&self) -> io::Result<()> {
        self.socket.readable().await?.clear_ready();
        Ok(())
    }
}

/// What one look at a socket yields.
enum Taken {
    Nothing,
    Unwanted,
    Packet(v1::CapturedPacket),
}

impl Capture {
    /// Begins it: what comes from now on is in it. In the network namespace of the calling thread.
    /// Needs a runtime.
    pub fn open(
        datapath: Arc<HostDatapath>,
        subject: Subject,
        permit: OwnedSemaphorePermit,
    ) -> Result<Self, CaptureError> {
        let Subject { slot: number, attachment, filter, count, time } = subject;
        let datapath::Attachment { vni, generation } = attachment;
        let ifindex = datapath.slot(number)?.ifindex;
        let (underlay, end) = datapath.underlay();
        let tunnel = Filter::tunnel(vni, end.is_ipv4())?;
        Ok(Self {
            inside: Side::open(ifindex, None)?,
            outside: Side::open(underlay, Some(&tunnel))?,
            slot: sides::Slot { ifindex, generation, vni },
            number,
            end,
            filter,
            left: count.unwrap_or(u64::MAX),
            deadline: time.map(|time| Instant::now() + time),
            buffer: vec![0; FRAME_MAX],
            datapath,
            _permit: permit,
        })
    }

    /// Sends what comes, until it ends or nobody receives it.
    pub async fn run(mut self, messages: Sender<Result<v1::CapturePacketsResponse, Status>>) {
        let limit = self.deadline;
        let ended = tokio::select! {
            ended = self.pass_on(&messages) => ended,
            () = messages.closed() => return,
            () = until(limit) => Ok("seconds"),
        };
        let last = ended.and_then(|ended| {
            let message = self.message(vec![])?;
            Ok(v1::CapturePacketsResponse { ended: ended.to_owned(), ..message })
        });
        let last = last.map_err(|error| Status::internal(error.to_string()));
        // Whoever does not listen any more needs no end.
        drop(messages.send(last).await);
    }

    /// Sends what comes, until the instance ends, or it is enough.
    async fn pass_on(
        &mut self,
        messages: &Sender<Result<v1::CapturePacketsResponse, Status>>,
    ) -> Result<&'static str, CaptureError> {
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            // Before looking for packets: what is taken after the end is not of this instance.
            let is_over = self
                .datapath
                .attachment(self.number)?
                .is_none_or(|attachment| attachment.generation != self.slot.generation);
            let (packets, is_all) = self.collect()?;
            let is_empty = packets.is_empty();
            self.left -= packets.len() as u64;
            if !is_empty {
                let message = self.message(packets)?;
                // `run` sees that nobody receives it.
                drop(messages.send(Ok(message)).await);
            }
            if self.left == 0 {
                return Ok("count");
            }
            if is_all {
                if is_over {
                    return Ok("instance");
                }
                tokio::select! {
                    more = self.inside.more() => more?,
                    more = self.outside.more() => more?,
                    _ = ticks.tick() => {
                        let message = self.message(vec![])?;
                        drop(messages.send(Ok(message)).await);
                    }
                }
            }
        }
    }

    fn message(
        &mut self,
        packets: Vec<v1::CapturedPacket>,
    ) -> Result<v1::CapturePacketsResponse, CaptureError> {
        let (inside_lost, outside_lost) = (self.inside.lost()?, self.outside.lost()?);
        let ended = String::new();
        Ok(v1::CapturePacketsResponse { packets, inside_lost, outside_lost, ended })
    }

    /// Packets that are there, a message full at most, and whether there are no more.
    fn collect(&mut self) -> Result<(Vec<v1::CapturedPacket>, bool), CaptureError> {
        let (mut packets, mut bytes, mut is_all) = (Vec::new(), 0, false);
        for _ in 0..MESSAGE_FRAMES / 2 {
            let both = [self.inside()?, self.outside()?];
            is_all = matches!(both, [Taken::Nothing, Taken::Nothing]);
            for taken in both {
                if let Taken::Packet(packet) = taken {
                    bytes += packet.frame.len();
                    packets.push(packet);
                }
            }
            if is_all || bytes >= MESSAGE_BYTES || packets.len() as u64 >= self.left {
                break;
            }
        }
        packets.sort_by_key(|packet| packet.unix_ns);
        packets.truncate(usize::try_from(self.left).unwrap_or(usize::MAX));
        Ok((packets, is_all))
    }

    fn inside(&mut self) -> Result<Taken, CaptureError> {
        let Some(received) = self.inside.socket.get_ref().receive(&mut self.buffer)? else {
            return Ok(Taken::Nothing);
        };
        // Looked up after it was received: what the slot's next tenant sends is not shown.
        if self.datapath.generation(self.number)? != self.slot.generation {
            return Ok(Taken::Nothing);
        }
        let frame = &self.buffer[..received.length.min(FRAME_MAX)];
        Ok(self.wanted(v1::CaptureSide::Inside, received, received.length, frame))
    }

    fn outside(&mut self) -> Result<Taken, CaptureError> {
        let Some(received) = self.outside.socket.get_ref().receive(&mut self.buffer)? else {
            return Ok(Taken::Nothing);
        };
        let frame = &self.buffer[..received.length.min(FRAME_MAX)];
        let Some(inner) = self.slot.outside(frame, self.end, |key| self.datapath.claim(key)) else {
            return Ok(Taken::Unwanted);
        };
        let length = received.length - (frame.len() - inner.len());
        Ok(self.wanted(v1::CaptureSide::Outside, received, length, inner))
    }

    fn wanted(
        &self,
        side: v1::CaptureSide,
        Received { unix_ns, .. }: Received,
        length: usize,
        frame: &[u8],
    ) -> Taken {
        if !self.filter.matches(frame) {
            return Taken::Unwanted;
        }
        let (length, frame) = (length as u32, frame.to_vec());
        Taken::Packet(v1::CapturedPacket { side: side.into(), unix_ns, length, frame })
    }
}

/// Waits until then; for ever, if there is no end.
async fn until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use etherparse::PacketBuilder;

    /// A guest's packet.
    pub fn inside() -> Vec<u8> {
        let mut frame = Vec::new();
        PacketBuilder::ethernet2([2; 6], [4; 6])
            .ipv4([169, 254, 0, 9], [10, 1, 0, 20], 64)
            .udp(4000, 53)
            .write(&mut frame, b"hello")
            .unwrap();
        frame
    }

    /// A frame in the tunnel from this end of it to the next address.
    pub fn tunnelled(end: IpAddr, vni: u32, inner: &[u8]) -> Vec<u8> {
        let ethernet = PacketBuilder::ethernet2([2; 6], [4; 6]);
        let [high, middle, low] = [16, 8, 0].map(|bits| (vni >> bits) as u8);
        let payload = [&[8, 0, 0, 0, high, middle, low, 0], inner].concat();
        let mut frame = Vec::new();
        let ip = match end {
            IpAddr::V4(end) => {
                let to = (u32::from(end) + 1).to_be_bytes();
                ethernet.ipv4(end.octets(), to, 64)
            }
            IpAddr::V6(end) => {
                let to = (u128::from(end) + 1).to_be_bytes();
                ethernet.ipv6(end.octets(), to, 64)
            }
        };
        ip.udp(50000, 4789).write(&mut frame, &payload).unwrap();
        frame
    }
}
