//! Link-local services: what a guest reaches beside its VPC.
//!
//! [`metadata`] tells an instance who it is, [`dns`] resolves its VPC's names. Packets come and go
//! by a TUN device, where eBPF programs put guests' and take answers: the kernel's own TCP/IP is
//! not on the way. Each guest has a [`stack`] of its own, for as long as it is attached.

mod dns;
mod identity;
mod metadata;
mod stack;

use std::collections::HashMap;
use std::io;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::Serialize;
use smoltcp::wire::Ipv4Packet;
use tokio_tun::Tun;
use warren_abi::services::{DNS, METADATA, address_in, attachment_in, stamp, vpc_of};
use warren_abi::wire::slot_number;

use self::dns::Forwarder;
pub use self::dns::Naming;
use self::identity::Identity;
pub use self::identity::KeyError;
use self::stack::{Outlet, Stack};
use crate::boot::BootId;
use crate::datapath::Attachment;

/// Metadata connections of one guest at a time.
const METADATA_CONNECTIONS: usize = 4;
/// DNS connections of one guest at a time.
const DNS_CONNECTIONS: usize = 2;
/// A guest that sent nothing for so long has no stack any more, until it sends again.
const IDLE: Duration = Duration::from_mins(2);
/// How often it is looked for idle ones.
const TIDY: Duration = Duration::from_secs(15);
/// After the device failed, it is tried again.
const RETRY: Duration = Duration::from_secs(1);

/// Why services cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum ServicesError {
    /// The device cannot be opened.
    #[error("cannot open the services' device {device}: {source}")]
    Device {
        /// Its name.
        device: String,
        /// Why.
        source: tokio_tun::Error,
    },
    /// There is no key.
    #[error(transparent)]
    Key(#[from] KeyError),
}

/// Who is where: what the host knows, as it is now.
pub trait Directory: Send + Sync + 'static {
    /// What a slot is attached to.
    fn attachment(&self, slot: u32) -> Option<Attachment>;
    /// The instance on a slot.
    fn instance(&self, slot: u32) -> Option<Instance>;
    /// A VPC.
    fn vpc(&self, vni: u32) -> Option<Vpc>;
}

/// What an instance is told of itself: names and values of the metadata service, and claims of
/// identity tokens.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Instance {
    /// UUID.
    pub instance_id: String,
    /// Host name.
    pub hostname: String,
    /// Address on the host-local link.
    pub local_ipv4: String,
    /// MAC address.
    pub mac: String,
    /// Name of its VPC.
    pub vpc: String,
    /// Network identifier of its VPC.
    pub vni: u32,
    /// The address in the VPC that it appears as.
    pub shared_ipv4: String,
    /// Where names of one label are looked for; empty: nowhere.
    pub search_domain: String,
    /// Name of its host.
    pub host: String,
}

/// What services know of a VPC.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Vpc {
    /// How names are resolved in it.
    pub naming: Naming,
}

/// What services are made from.
#[derive(Clone, Debug)]
pub struct Options {
    /// Name of the TUN device, which is there.
    pub device: String,
    /// The largest packet, in bytes.
    pub mtu: u16,
    /// Directory of the key.
    pub run_dir: PathBuf,
    /// Name of the host, which signs identity tokens.
    pub host: String,
    /// Session tokens end with it.
    pub boot: BootId,
}

/// A guest that is served.
struct Session {
    slot: u32,
    attachment: Attachment,
    stack: Arc<Stack>,
    directory: Arc<dyn Directory>,
    forwarder: Arc<Forwarder>,
    identity: Arc<Identity>,
}

/// A guest's stack, and when it was last used.
struct Guest {
    session: Arc<Session>,
    used: Instant,
}

/// A VPC's way to its resolver.
struct Network {
    stack: Arc<Stack>,
    forwarder: Arc<Forwarder>,
}

/// The services of a host. They are there while [`Services::run`] does.
pub struct Services {
    tun: Arc<Tun>,
    mtu: u16,
    directory: Arc<dyn Directory>,
    identity: Arc<Identity>,
    guests: HashMap<u32, Guest>,
    networks: HashMap<u32, Network>,
}

impl Services {
    /// Opens the device, in the network namespace of the calling thread. Needs a runtime.
    pub fn open(options: &Options, directory: Arc<dyn Directory>) -> Result<Self, ServicesError> {
        let identity = Arc::new(Identity::open(&options.run_dir, &options.host, &options.boot)?);
        let device = |source| ServicesError::Device { device: options.device.clone(), source };
        let tuns = Tun::builder().name(&options.device).build().map_err(device)?;
        let tun =
            tuns.into_iter().next().ok_or_else(|| device(io::Error::other("no queue").into()))?;
        Ok(Self {
            tun: Arc::new(tun),
            mtu: options.mtu,
            directory,
            identity,
            guests: HashMap::new(),
            networks: HashMap::new(),
        })
    }

    /// Serves, for ever.
    pub async fn run(mut self) {
        let mut packet = vec![0; usize::from(u16::MAX)];
        let mut tidy = tokio::time::interval(TIDY);
        loop {
            let tun = self.tun.clone();
            tokio::select! {
                received = tun.recv(&mut packet) => match received {
                    Ok(length) => self.receive(&packet[..length]),
                    Err(error) => {
                        tracing::error!("cannot read the services' device: {error}");
                        tokio::time::sleep(RETRY).await;
                    }
                },
                _ = tidy.tick() => self.tidy(),
            }
        }
    }

    /// Gives a packet to whom it is for.
    fn receive(&mut self, bytes: &[u8]) {
        let Ok(packet) = Ipv4Packet::new_checked(bytes) else { return };
        if let Some(vni) = vpc_of(packet.dst_addr().into()) {
            if let Some(network) = self.networks.get(&vni) {
                network.stack.receive(bytes);
            }
            return;
        }
        let Some(slot) = slot_number(packet.src_addr()) else { return };
        let Some(attachment) = self.directory.attachment(slot) else { return };
        // What a former tenant sent is nobody's.
        if packet.ident() == stamp(attachment.generation).get() {
            self.guest(slot, attachment).receive(bytes);
        }
    }

    /// The stack of who is attached to a slot now.
    fn guest(&mut self, slot: u32, attachment: Attachment) -> &Stack {
        let is_former = |guest: &Guest| guest.session.attachment != attachment;
        if self.guests.get(&slot).is_none_or(is_former) {
            let session = self.session(slot, attachment);
            if let Some(former) = self.guests.insert(slot, Guest { session, used: Instant::now() })
            {
                former.session.stack.close();
            }
        }
        let guest = self.guests.get_mut(&slot).expect("it was there or is now");
        guest.used = Instant::now();
        &guest.session.stack
    }

    /// Begins to serve a guest.
    fn session(&mut self, slot: u32, attachment: Attachment) -> Arc<Session> {
        let stack = self.stack(&[METADATA, DNS], attachment.generation);
        let session = Arc::new(Session {
            slot,
            attachment,
            stack,
            directory: self.directory.clone(),
            forwarder: self.forwarder(attachment.vni),
            identity: self.identity.clone(),
        });
        // All sockets are there before the first packet. A new stack is open, and its ports free.
        for stream in (0..METADATA_CONNECTIONS).flat_map(|_| metadata::listen(&session.stack)) {
            tokio::spawn(metadata::serve(session.clone(), stream));
        }
        for stream in (0..DNS_CONNECTIONS).flat_map(|_| dns::listen(&session.stack)) {
            tokio::spawn(dns::serve_streams(session.clone(), stream));
        }
        if let Ok(socket) = dns::bind(&session.stack) {
            tokio::spawn(dns::serve_datagrams(session.clone(), socket));
        }
        session
    }

    fn forwarder(&mut self, vni: u32) -> Arc<Forwarder> {
        if let Some(network) = self.networks.get(&vni) {
            return network.forwarder.clone();
        }
        let address = Ipv4Addr::from(address_in(vni));
        let stack = self.stack(&[address], attachment_in(vni).generation());
        let forwarder = Arc::new(Forwarder::new(stack.clone(), address));
        self.networks.insert(vni, Network { stack, forwarder: forwarder.clone() });
        forwarder
    }

    fn stack(&self, addresses: &[Ipv4Addr], generation: u32) -> Arc<Stack> {
        let outlet = Outlet { tun: self.tun.clone(), mtu: self.mtu, stamp: stamp(generation) };
        let stack = Stack::new(addresses, outlet);
        tokio::spawn(stack.clone().run());
        stack
    }

    /// Forgets guests that are gone or idle, and VPCs without guests.
    fn tidy(&mut self) {
        self.guests.retain(|slot, guest| {
            let is_here = self.directory.attachment(*slot) == Some(guest.session.attachment);
            let stays = is_here && guest.used.elapsed() < IDLE;
            if !stays {
                guest.session.stack.close();
            }
            stays
        });
        // Each guest's session has it as well.
        self.networks.retain(|_, network| Arc::strong_count(&network.forwarder) > 1);
    }
}
