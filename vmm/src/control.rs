//! The messages between the client and `warren-vmm`'s processes, and how they are framed.
//!
//! To the zygote: one postcard message per `SOCK_SEQPACKET` packet ([`ZygoteRequest`] and
//! [`ZygoteReply`], with a descriptor attached as `SCM_RIGHTS` where they say so).
//!
//! To a microVM: a stream socket at [`socket_path`]. The first line of a connection decides what it
//! is: [`CONTROL_LINE`], followed by frames (a little-endian `u32` length and that many bytes of
//! postcard, [`Request`] one way and [`Reply`] the other), or `CONNECT <port>\n`, answered by
//! `OK <port>\n` and followed by the raw bytes of a vsock stream (Firecracker's convention).

use std::fmt;
use std::io::IoSliceMut;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use serde::{Deserialize, Serialize};

use crate::make::Make;

/// What a client sends first on a control connection.
pub const CONTROL_LINE: &[u8] = b"CONTROL\n";

/// The longest control message, in bytes.
pub const MESSAGE_MAX: usize = 16 * 1024;

/// The longest [`ReleaseRequest::tag`], in bytes.
pub const TAG_MAX: usize = 4096;

/// How long a guest may run without an exit, in processor time, before it is ended as one that loops
/// for ever, unless its zygote was told otherwise.
pub const WATCHDOG: Duration = Duration::from_secs(5);

/// Where the microVM in a slot listens.
pub fn socket_path(run_dir: &Path, slot: u32) -> PathBuf {
    run_dir.join(format!("vm-{slot}.sock"))
}

/// The slot whose microVM listens at this path; `None` if it is not the path of a microVM.
pub fn socket_slot(path: &Path) -> Option<u32> {
    path.file_name()?.to_str()?.strip_prefix("vm-")?.strip_suffix(".sock")?.parse().ok()
}

/// Receives a packet, and the last descriptor that came with it. Nobody at the other end: 0 bytes.
pub(crate) fn receive_with_descriptor(
    socket: &OwnedFd,
    buffer: &mut [u8],
    flags: MsgFlags,
) -> nix::Result<(usize, Option<OwnedFd>)> {
    let mut ancillary = nix::cmsg_space!([RawFd; 4]);
    let mut slices = [IoSliceMut::new(buffer)];
    let flags = flags | MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut slices, Some(&mut ancillary), flags)?;
    let mut descriptors = Vec::new();
    for part in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(received) = part {
            // SAFETY: the kernel has just made these descriptors for this process.
            descriptors.extend(received.iter().map(|&fd| unsafe { OwnedFd::from_raw_fd(fd) }));
        }
    }
    Ok((message.bytes, descriptors.pop()))
}

/// What the zygote is asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ZygoteRequest {
    /// Fork a microVM into this slot. Its TAP is attached: `IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`,
    /// header of 12 bytes (`TUNSETVNETHDRSZ`), non-blocking, no offloads.
    Fork {
        /// Slot number; names the socket, the control group and the user.
        slot: u32,
        /// How far it is to go by itself.
        tier: Tier,
    },
    /// First of all, from a client that said it would: the memory of a template, sealed, as another
    /// zygote sent it with [`ZygoteReply::Loaded`], is attached.
    Memory {
        /// Checksum of the template.
        template: [u8; 32],
    },
}

/// What runs in a microVM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum GuestKind {
    /// The no-OS guest: ring 3 only, polls its devices.
    NoOs,
    /// Linux, with interrupts.
    Linux,
}

/// How far a microVM is prepared. Each tier is quicker to start from than the one before, and costs
/// more to keep.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Tier {
    /// A jailed process with KVM's objects.
    Shell,
    /// The template's memory and state are loaded, and the pages that it will write are its own.
    Loaded,
    /// It ran up to its release barrier.
    Parked,
}

impl Tier {
    /// Its name, in metrics and answers.
    pub fn name(self) -> &'static str {
        match self {
            Self::Shell => "shell",
            Self::Loaded => "loaded",
            Self::Parked => "parked",
        }
    }
}

/// What the zygote answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ZygoteReply {
    /// Once, when it starts: the template is verified and loaded. Its memory is attached, sealed.
    Loaded {
        /// Checksum of the template.
        template: [u8; 32],
        /// What all of its microVMs are of.
        make: Make,
    },
    /// The microVM's process exists and its socket takes connections.
    Forked {
        /// Slot number.
        slot: u32,
        /// Process.
        pid: i32,
    },
    /// It could not be done; the zygote goes on, unless this is its first message.
    Failed {
        /// Why, and what to do.
        error: String,
    },
}

/// What a microVM is asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// Who are you? Answered by [`Reply::Status`].
    Status,
    /// Prepare yourself at least so far. Answered by [`Reply::Status`] when that is done.
    Advance(Tier),
    /// Take this identity and run, from whatever tier. Answered by [`Reply::Ready`] or [`Reply::Refused`].
    Release(ReleaseRequest),
    /// Become again what you were at your barrier, for another release: memory and devices as in the
    /// image, all calls cut off. Answered by [`Reply::Status`]; refused before the first release.
    /// Whoever asks must not let one tenant's microVM become another's.
    Recycle,
    /// End. Answered by [`Reply::Ended`].
    Stop,
    /// Save yourself when your guest waits next, and go on. Answered by [`Reply::Snapshot`]; refused
    /// before the release.
    Snapshot,
    /// What are you of? Answered by [`Reply::Make`]. Those of versions before it refuse.
    Make,
}

/// What a microVM answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reply {
    /// To [`Request::Status`], [`Request::Advance`] and [`Request::Recycle`].
    Status(Status),
    /// To [`Request::Release`]: the guest acknowledged its identity.
    Ready(Timeline),
    /// To a request that cannot be granted; nothing changed.
    Refused(Refusal),
    /// The microVM has ended. Sent unasked to every control connection; the last message.
    Ended(EndReason),
    /// To [`Request::Snapshot`]: so many bytes follow without a frame, a plain [diff's
    /// file](crate::snapshot::diff).
    Snapshot {
        /// How many.
        bytes: u64,
    },
    /// To [`Request::Make`].
    Make(Make),
}

/// The identity a clone is to take.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReleaseRequest {
    /// The public part of the identity. Entropy and clock are added by the VMM.
    pub identity: PublicIdentity,
    /// Opaque to the VMM, returned by [`Status::tag`]; at most [`TAG_MAX`] bytes.
    pub tag: Vec<u8>,
}

/// What may be known of a clone's identity.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PublicIdentity {
    /// Instance identifier, a version 4 UUID (RFC 9562).
    pub instance_id: [u8; 16],
    /// Host name, at most 64 bytes, without zero bytes.
    pub hostname: String,
    /// MAC address, unicast.
    pub mac: [u8; 6],
    /// Address of the guest's interface, a /32.
    pub ipv4: [u8; 4],
    /// Default gateway, reached on-link.
    pub gateway: [u8; 4],
    /// Largest IP packet, in bytes; 576 to 1500.
    pub mtu: u16,
}

/// How far a microVM is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum State {
    /// Nothing of its guest's ran but what the template did.
    Pooled(Tier),
    /// Released: it has an identity.
    Running,
}

/// A microVM as it is now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Slot number.
    pub slot: u32,
    /// Process.
    pub pid: i32,
    /// How far it is.
    pub state: State,
    /// Who it is, once it was released.
    pub identity: Option<PublicIdentity>,
    /// [`ReleaseRequest::tag`]; empty before.
    pub tag: Vec<u8>,
}

/// When a microVM came how far, in nanoseconds on `CLOCK_MONOTONIC`; 0 for what it has not done, or
/// has passed over.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timeline {
    /// The zygote had the request.
    pub asked_ns: u64,
    /// The process ran.
    pub forked_ns: u64,
    /// All walls of its jail stood.
    pub jailed_ns: u64,
    /// [`Tier::Shell`].
    pub shell_ns: u64,
    /// It began to go on from [`Tier::Shell`].
    pub loading_ns: u64,
    /// [`Tier::Loaded`].
    pub loaded_ns: u64,
    /// It began to go on from [`Tier::Loaded`] to the barrier.
    pub parking_ns: u64,
    /// [`Tier::Parked`].
    pub parked_ns: u64,
    /// It read the request for its release.
    pub received_ns: u64,
    /// The guest was let go: [0 on its own clock](warren_abi::microvm::Identity::tsc).
    pub released_ns: u64,
    /// The guest's acknowledgement arrived.
    pub ready_ns: u64,
}

impl Timeline {
    /// The stages of its preparation that it went through, each with the time that it took, in
    /// nanoseconds.
    pub fn stages(&self) -> impl Iterator<Item = (&'static str, u64)> {
        self.intervals().map(|(name, from_ns, to_ns)| (name, to_ns.saturating_sub(from_ns)))
    }

    /// The same, each with when it began and ended.
    pub fn intervals(&self) -> impl Iterator<Item = (&'static str, u64, u64)> {
        let stage = |name, from: u64, to: u64| (to > 0).then_some((name, from, to));
        [
            stage("fork", self.asked_ns, self.forked_ns),
            stage("jail", self.forked_ns, self.jailed_ns),
            stage("shell", self.jailed_ns, self.shell_ns),
            stage("load", self.loading_ns, self.loaded_ns),
            stage("park", self.parking_ns, self.parked_ns),
        ]
        .into_iter()
        .flatten()
    }
}

/// Why a request changed nothing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum Refusal {
    /// [`Request::Release`] came a second time.
    #[error("the microVM was released before: fork another one")]
    AlreadyReleased,
    /// [`Request::Recycle`] or [`Request::Snapshot`] came before a release.
    #[error("the microVM was not released: there is nothing to recycle, or to snapshot")]
    NotReleased,
    /// [`Request::Snapshot`] came to a Linux guest.
    #[error("a Linux guest that runs cannot be snapshotted: clone its template")]
    LinuxSnapshot,
    /// A field of the identity is out of its range.
    #[error("identity refused: {0}")]
    Identity(String),
    /// The message is not one of this version.
    #[error("not a control message of this version: client and microVM must be of one release")]
    Malformed,
}

/// Why a microVM ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum EndReason {
    /// [`Request::Stop`].
    Stopped,
    /// The guest raised an exception, which nothing in it handles (Intel SDM volume 3, 6.15).
    Exception {
        /// Vector, 0 to 31.
        vector: u8,
        /// Error code, where the vector has one.
        error_code: Option<u64>,
        /// Address of the instruction.
        rip: u64,
        /// Address whose access faulted, for a page fault.
        address: Option<u64>,
    },
    /// The guest's panic message, control characters escaped.
    Panic {
        /// Message with its place.
        message: String,
    },
    /// The guest faulted beyond its own handlers.
    TripleFault {
        /// Address of the instruction.
        rip: u64,
    },
    /// A Linux guest powered off.
    PoweredOff,
    /// A Linux guest rebooted, which a panic of its kernel does as well.
    Reset {
        /// Its last lines on the serial port.
        said: String,
    },
    /// The guest ran without an exit for longer than it may.
    Watchdog {
        /// Where it was.
        rip: u64,
        /// What it may, in milliseconds.
        budget_ms: u64,
    },
    /// The guest wrote something into a virtqueue which virtio does not allow.
    Queue {
        /// Device and queue, such as `net tx`.
        queue: String,
        /// What is wrong.
        error: String,
    },
    /// The guest used a port or register that there is not, or out of order.
    Protocol {
        /// What it did.
        error: String,
    },
    /// It could not be made.
    Setup {
        /// Why, and what to do.
        error: String,
    },
    /// KVM or the host failed it.
    Host {
        /// Why.
        error: String,
    },
    /// Its process vanished without a word: killed from outside.
    Lost,
}

impl EndReason {
    /// The exit status of the microVM's process, one for each kind.
    pub fn exit_code(&self) -> i32 {
        match self {
            Self::Stopped => 0,
            Self::Exception { .. } => 10,
            Self::Panic { .. } => 11,
            Self::TripleFault { .. } => 12,
            Self::Watchdog { .. } => 13,
            Self::Queue { .. } => 14,
            Self::Protocol { .. } => 15,
            Self::Setup { .. } => 16,
            Self::Host { .. } => 17,
            Self::Lost => 18,
            Self::PoweredOff => 19,
            Self::Reset { .. } => 20,
        }
    }
}

impl fmt::Display for EndReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stopped => f.write_str("stopped"),
            Self::Exception { vector, error_code, rip, address } => {
                write!(f, "exception {vector} ({}) at {rip:#x}", exception_name(*vector))?;
                if let Some(code) = error_code {
                    write!(f, ", error code {code:#x}")?;
                }
                if let Some(address) = address {
                    write!(f, ", address {address:#x}")?;
                }
                Ok(())
            }
            Self::Panic { message } => write!(f, "guest panic: {message}"),
            Self::TripleFault { rip } => write!(f, "triple fault at {rip:#x}"),
            Self::PoweredOff => f.write_str("the guest powered off"),
            Self::Reset { said } => write!(f, "the guest rebooted; its last words: {said}"),
            Self::Watchdog { rip, budget_ms } => {
                write!(f, "watchdog: ran {budget_ms} ms without an exit, at {rip:#x}")
            }
            Self::Queue { queue, error } => write!(f, "virtqueue {queue}: {error}"),
            Self::Protocol { error } => write!(f, "guest broke the protocol: {error}"),
            Self::Setup { error } => write!(f, "setup failed: {error}"),
            Self::Host { error } => write!(f, "host failure: {error}"),
            Self::Lost => f.write_str("its process vanished"),
        }
    }
}

/// Name of an x86 exception vector (Intel SDM volume 3, table 6-1).
pub fn exception_name(vector: u8) -> &'static str {
    match vector {
        0 => "#DE divide error",
        1 => "#DB debug",
        2 => "NMI",
        3 => "#BP breakpoint",
        4 => "#OF overflow",
        5 => "#BR bound range",
        6 => "#UD invalid opcode",
        7 => "#NM device not available",
        8 => "#DF double fault",
        10 => "#TS invalid TSS",
        11 => "#NP segment not present",
        12 => "#SS stack fault",
        13 => "#GP general protection",
        14 => "#PF page fault",
        16 => "#MF x87 error",
        17 => "#AC alignment check",
        18 => "#MC machine check",
        19 => "#XM SIMD error",
        20 => "#VE virtualisation",
        21 => "#CP control protection",
        _ => "reserved",
    }
}

/// Encodes a message without a frame, as the zygote's socket carries it.
pub fn encode<T: Serialize>(message: &T) -> Vec<u8> {
    // A Vec takes any length and these types cannot fail to serialise.
    postcard::to_allocvec(message).unwrap_or_default()
}

/// Encodes a message with its length before it, as a microVM's socket carries it.
pub fn encode_frame<T: Serialize>(message: &T) -> Vec<u8> {
    let body = encode(message);
    let mut frame = Vec::with_capacity(4 + body.len());
    frame.extend_from_slice(&(body.len() as u32).to_le_bytes());
    frame.extend_from_slice(&body);
    frame
}

/// A frame that is longer than [`MESSAGE_MAX`], or whose content is no message of this version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a control message of this version")]
pub struct Malformed;

/// Takes the first whole frame out of what was received.
///
/// # Errors
/// [`Malformed`]; the connection cannot be used any more.
pub fn take_frame<T: for<'a> Deserialize<'a>>(
    buffer: &mut Vec<u8>,
) -> Result<Option<T>, Malformed> {
    let Some(header) = buffer.first_chunk::<4>() else { return Ok(None) };
    let length = u32::from_le_bytes(*header) as usize;
    if length > MESSAGE_MAX {
        return Err(Malformed);
    }
    let Some(body) = buffer.get(4..4 + length) else { return Ok(None) };
    let message = decode(body)?;
    buffer.drain(..4 + length);
    Ok(Some(message))
}

/// Decodes what [`encode`] made.
///
/// # Errors
/// [`Malformed`], also if bytes are left over.
pub fn decode<T: for<'a> Deserialize<'a>>(bytes: &[u8]) -> Result<T, Malformed> {
    match postcard::take_from_bytes(bytes) {
        Ok((message, [])) => Ok(message),
        _ => Err(Malformed),
    }
}
