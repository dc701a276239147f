//! Frames as an interface saw them, with the kernel's time stamps.

use std::os::fd::AsRawFd;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::socket::{MsgFlags, recv, send};
use warren_dataplane::capture::{PacketSocket, Received};

use crate::netns::Namespace;

/// A packet socket on one interface.
#[derive(Debug)]
pub struct Capture {
    socket: PacketSocket,
}

/// A frame and when the kernel saw it.
#[derive(Clone, Debug)]
pub struct Frame {
    /// Nanoseconds since 1970.
    pub unix_ns: u64,
    /// From the destination MAC on.
    pub bytes: Vec<u8>,
}

impl Capture {
    /// Captures from now on, incoming and outgoing frames.
    pub fn start(namespace: &Namespace, interface: &str) -> Result<Self> {
        let socket = namespace.run(|| -> Result<PacketSocket> {
            let index = nix::net::if_::if_nametoindex(interface)
                .with_context(|| format!("no interface {interface}"))?;
            Ok(PacketSocket::open(index, None, 8 << 20)?)
        })?;
        Ok(Self { socket })
    }

    /// Takes incoming frames only from now on.
    pub fn ignore_outgoing(&self) -> Result<()> {
        // Linux's <linux/if_packet.h>; the libc crate has it not for every target.
        const PACKET_IGNORE_OUTGOING: libc::c_int = 23;
        let on: libc::c_int = 1;
        // SAFETY: the pointer and the length are those of a whole c_int.
        let result = unsafe {
            libc::setsockopt(
                self.socket.as_raw_fd(),
                libc::SOL_PACKET,
                PACKET_IGNORE_OUTGOING,
                (&raw const on).cast(),
                size_of::<libc::c_int>() as u32,
            )
        };
        nix::errno::Errno::result(result)?;
        Ok(())
    }

    /// A frame that is there already, cut at the end of `buffer`: its length. Cheaper than
    /// [`Capture::next`], without a time stamp.
    pub fn try_next(&self, buffer: &mut [u8]) -> Result<Option<usize>> {
        match recv(self.socket.as_raw_fd(), buffer, MsgFlags::MSG_DONTWAIT) {
            Ok(length) => Ok(Some(length)),
            Err(nix::errno::Errno::EAGAIN) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Puts a frame on the wire.
    pub fn send(&self, frame: &[u8]) -> Result<()> {
        send(self.socket.as_raw_fd(), frame, MsgFlags::empty())?;
        Ok(())
    }

    /// The next frame; `None` after `patience` without one.
    pub fn next(&self, patience: Duration) -> Result<Option<Frame>> {
        use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
        use std::os::fd::AsFd;
        let mut fds = [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
        let patience = PollTimeout::try_from(patience).unwrap_or(PollTimeout::MAX);
        if poll(&mut fds, patience)? == 0 {
            return Ok(None);
        }
        let mut bytes = vec![0; 65536];
        let received = self.socket.receive(&mut bytes)?;
        let Some(Received { unix_ns, length }) = received else { return Ok(None) };
        bytes.truncate(length);
        Ok(Some(Frame { unix_ns, bytes }))
    }

    /// All frames that came so far.
    pub fn drain(&self) -> Result<Vec<Frame>> {
        let mut frames = Vec::new();
        while let Some(frame) = self.next(Duration::ZERO)? {
            frames.push(frame);
        }
        Ok(frames)
    }
}

/// The VNI of a VXLAN frame over IPv4 without options (RFC 7348); `None` if it is no such frame.
pub fn vni(frame: &[u8]) -> Option<u32> {
    let header = frame.get(..50)?;
    let is_vxlan = header[12..14] == [8, 0]
        && header[14] == 0x45
        && header[23] == 17
        && header[36..38] == 4789u16.to_be_bytes();
    is_vxlan.then(|| u32::from_be_bytes([0, header[46], header[47], header[48]]))
}
