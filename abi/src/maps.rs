//! Keys and values of the BPF maps, without padding: a key's every byte counts.
//!
//! Pinned maps outlive the program that made them. A change of a layout here needs the next number
//! in [`layouts`], and in `warrend` how its entries are made from the former's.

pub use crate::claim::Claim;
use crate::drop::Drop;
use crate::flow::{FlowState, Timers};
pub use crate::flowlog::{FlowCounts, FlowEvent};
use crate::fragment::{Cell, Datagram};
pub use crate::limit::{Held, Limits};
pub use crate::policy::{Guard, Policy, Rule};
pub use crate::route::{CachedRoute, Route, RouteKey};
use crate::wire::{Be16, Ip, Ipv4, Mac};

/// Names of the maps.
pub mod names {
    /// Host: index of a TAP -> [`Slot`](super::Slot).
    pub const SLOTS: &str = "SLOTS";
    /// Host: VNI -> [`HostVpc`](super::HostVpc).
    pub const HOST_VPCS: &str = "HOST_VPCS";
    /// Host: [`OutKey`](super::OutKey) -> [`Flow`](super::Flow).
    pub const CT_OUT: &str = "CT_OUT";
    /// Host: [`InKey`](super::InKey) -> [`InFlow`](super::InFlow).
    pub const CT_IN: &str = "CT_IN";
    /// Proxy: VNI -> [`ProxyVpc`](super::ProxyVpc).
    pub const PROXY_VPCS: &str = "PROXY_VPCS";
    /// Proxy: [`InterfaceKey`](super::InterfaceKey) -> VNI.
    pub const INTERFACES: &str = "INTERFACES";
    /// Proxy: [`BlockKey`](super::BlockKey) -> underlay address of the host that holds the block.
    pub const BLOCKS: &str = "BLOCKS";
    /// Both, per CPU: scope -> [`Drops`](super::Drops). The scope is a slot's number, or
    /// [`ProxyVpc::scope`](super::ProxyVpc::scope); 0 is nobody's.
    pub const DROPS: &str = "DROPS";
    /// Proxy: longest prefix of [`RouteKey`](super::RouteKey) -> [`Route`](super::Route).
    pub const ROUTES: &str = "ROUTES";
    /// Proxy, per CPU: [`CachedRoute::index`](super::CachedRoute::index) ->
    /// [`CachedRoute`](super::CachedRoute).
    pub const ROUTE_CACHE: &str = "ROUTE_CACHE";
    /// Both: how often any of the tables of slots, VPCs and blocks was changed, at index 0: what
    /// programs found in them before is looked up again.
    pub const CHANGES: &str = "CHANGES";
    /// Host: one of [`migration`](super::migration), at index 0.
    pub const MIGRATION: &str = "MIGRATION";
    /// Host, while migrating: the [`OutKey`](super::OutKey)s of flows that were left to the former
    /// version.
    pub const PASSED: &str = "PASSED";
    /// Both: one of [`tails`](super::tails) -> that program.
    pub const TAILS: &str = "TAILS";
    /// Host: number of a slot -> [`ServiceSlot`](super::ServiceSlot).
    pub const SERVICE_SLOTS: &str = "SERVICE_SLOTS";
    /// Both: scope, as of [`DROPS`] -> when its ICMP errors have used up less than their
    /// [`Rate`](crate::rate::ANSWERS), in nanoseconds of `CLOCK_MONOTONIC`.
    pub const ANSWERS: &str = "ANSWERS";
    /// Host: ring buffer of [`FlowEvent`](super::FlowEvent)s.
    pub const FLOW_EVENTS: &str = "FLOW_EVENTS";
    /// Host, per CPU: [`FlowCounts`](super::FlowCounts), at index 0.
    pub const FLOW_COUNTS: &str = "FLOW_COUNTS";
    /// Host: place -> [`Policy`](super::Policy). The first place is the loader's.
    pub const POLICIES: &str = "POLICIES";
    /// Host, per CPU: [`Rule::counter`](super::Rule::counter) -> how often it decided.
    pub const RULE_HITS: &str = "RULE_HITS";
    /// Both: [`Cell`](crate::fragment::Cell) -> [`Datagram`](crate::fragment::Datagram). The oldest
    /// go, if there are too many.
    pub const DATAGRAMS: &str = "DATAGRAMS";
    /// Host: number of a slot -> [`Limits`](super::Limits).
    pub const LIMITS: &str = "LIMITS";
    /// Host: number of a slot -> [`Held`](super::Held).
    pub const HELD: &str = "HELD";
    /// Proxy: [`ProxyVpc::scope`](super::ProxyVpc::scope) -> [`Reached`](super::Reached).
    pub const REACHED: &str = "REACHED";
    /// Proxy: VNI -> VNI of the address by which leaves what has no route in the VPC.
    pub const PUBLIC: &str = "PUBLIC";
    /// Proxy: VNI of a public address -> VNI of the VPC whose it is.
    pub const PRIVATE: &str = "PRIVATE";
    /// Host: [`Member`](super::Member) -> 1.
    pub const MEMBERS: &str = "MEMBERS";
    /// Host: VNI -> [`Claim`](super::Claim), the last one that came.
    pub const CLAIMS: &str = "CLAIMS";
    /// Both: underlay address -> when a request of BFD came from there last, in nanoseconds of
    /// `CLOCK_MONOTONIC`.
    pub const HEARD: &str = "HEARD";
}

/// Numbers of the layouts of pinned maps, which count up; 1 where none is given.
pub mod layouts {
    /// Of `CT_OUT`. 2: addresses of either family, traffic.
    pub const CT_OUT: u32 = 2;
    /// Of `CT_IN`. 2: addresses of either family, traffic.
    pub const CT_IN: u32 = 2;
    /// Of `HOST_VPCS`. 2: addresses of either family.
    pub const HOST_VPCS: u32 = 2;
    /// Of `PROXY_VPCS`. 2: addresses of either family.
    pub const PROXY_VPCS: u32 = 2;
    /// Of `INTERFACES`. 3: several shared addresses on an interface.
    pub const INTERFACES: u32 = 3;
    /// Of `BLOCKS`. 2: addresses of either family.
    pub const BLOCKS: u32 = 2;
    /// Of `CHANGES`. 2: it can be mapped.
    pub const CHANGES: u32 = 2;
    /// Of `DATAGRAMS`. 2: tunnels' ends of either family.
    pub const DATAGRAMS: u32 = 2;
    /// Of `DROPS`: as many counters.
    pub const DROPS: u32 = crate::drop::Drop::COUNTERS as u32;
}

/// How far the take-over of a former version's flows is, whose maps have another layout.
pub mod migration {
    /// There is none.
    pub const NONE: u32 = 0;
    /// Flows that are not known here are left to the former version, which begins new ones.
    pub const PASS: u32 = 1;
    /// New flows begin here; the former version has those that were left to it before.
    pub const BEGIN: u32 = 2;
}

/// Names of the programs.
pub mod programs {
    /// tcx ingress on a slot's TAP.
    pub const TAP: &str = "tap";
    /// What [`TAP`] ends with, in IPv6.
    pub const TAP_V6: &str = "tap_v6";
    /// What [`TUNNEL_HOST`] and [`UNDERLAY_HOST`] end with, in IPv6.
    pub const TO_GUEST_V6: &str = "to_guest_v6";
    /// What [`TAP`] and [`VPC`] end with, where a packet's sender is told why it went no further.
    pub const ANSWER: &str = "answer";
    /// What [`TAP_V6`] and [`VPC`] end with, for an ICMP error of their own.
    pub const ANSWER_V6: &str = "answer_v6";
    /// What [`TAP_V6`] ends with, for neighbour discovery.
    pub const RESOLVE_V6: &str = "resolve_v6";
    /// What [`TAP_V6`] ends with, for what goes into a VPC.
    pub const TRANSLATE_V6: &str = "translate_v6";
    /// What [`TAP`] and [`SERVICES`] end with, for an ICMP error.
    pub const ERROR_TO_VPC: &str = "error_to_vpc";
    /// What [`TAP_V6`] ends with, for an ICMP error.
    pub const ERROR_TO_VPC_V6: &str = "error_to_vpc_v6";
    /// tcx ingress on a host's VXLAN device.
    pub const TUNNEL_HOST: &str = "tunnel_host";
    /// tcx ingress on a proxy's VXLAN device.
    pub const TUNNEL_PROXY: &str = "tunnel_proxy";
    /// tcx ingress on a host's underlay interface.
    pub const UNDERLAY_HOST: &str = "underlay_host";
    /// tcx ingress on a proxy's underlay interface.
    pub const UNDERLAY_PROXY: &str = "underlay_proxy";
    /// tcx ingress on a proxy's interface in a VPC.
    pub const VPC: &str = "vpc";
    /// tcx egress there.
    pub const VPC_EGRESS: &str = "vpc_egress";
    /// Removes flows that ended; run by the daemon on a [`Sweep`](super::Sweep).
    pub const SWEEP: &str = "sweep";
    /// tcx ingress on the link-local services' TUN device.
    pub const SERVICES: &str = "services";
    /// tcx ingress on a host's device for fragments: first ones of guests.
    pub const FRAGMENTS_FIRST: &str = "fragments_first";
    /// tcx ingress on a host's device for fragments, behind the other: all others.
    pub const FRAGMENTS_REST: &str = "fragments_rest";
    /// What [`FRAGMENTS_FIRST`] ends with, in IPv6.
    pub const FRAGMENTS_FIRST_V6: &str = "fragments_first_v6";
    /// What [`FRAGMENTS_FIRST_V6`] ends with.
    pub const TRANSLATE_FIRST_V6: &str = "translate_first_v6";
    /// What [`FRAGMENTS_REST`] ends with, for a guest's in IPv6.
    pub const FRAGMENTS_REST_V6: &str = "fragments_rest_v6";
    /// What [`FRAGMENTS_REST`] ends with, for a proxy's in IPv6.
    pub const FRAGMENTS_TO_GUEST_V6: &str = "fragments_to_guest_v6";
    /// What [`FRAGMENTS_TO_GUEST_V6`] ends with, for a first one.
    pub const FIRST_TO_GUEST_V6: &str = "first_to_guest_v6";
    /// tcx ingress on a proxy's device for fragments.
    pub const FRAGMENTS_PROXY: &str = "fragments_proxy";
    /// What [`FRAGMENTS_PROXY`] ends with, in IPv6.
    pub const FRAGMENTS_PROXY_V6: &str = "fragments_proxy_v6";

    /// What a proxy's programs end with, for what leaves a VPC by a public address.
    pub const PUBLIC_OUT: &str = "public_out";
    /// The same, in IPv6.
    pub const PUBLIC_OUT_V6: &str = "public_out_v6";
    /// What a proxy's programs end with, for what is perhaps for a VPC's public address.
    pub const PUBLIC_IN: &str = "public_in";
    /// The same, in IPv6.
    pub const PUBLIC_IN_V6: &str = "public_in_v6";

    /// What [`UNDERLAY_HOST`] ends with, for what is not the tunnel's.
    pub const NODE_HOST: &str = "node_host";
    /// What [`UNDERLAY_PROXY`] ends with, for what is not the tunnel's.
    pub const NODE_PROXY: &str = "node_proxy";

    /// All of a host's.
    pub const OF_HOST: [&str; 21] = [
        TAP,
        TAP_V6,
        TO_GUEST_V6,
        ERROR_TO_VPC,
        ERROR_TO_VPC_V6,
        RESOLVE_V6,
        TRANSLATE_V6,
        ANSWER,
        ANSWER_V6,
        TUNNEL_HOST,
        UNDERLAY_HOST,
        SWEEP,
        SERVICES,
        FRAGMENTS_FIRST,
        FRAGMENTS_FIRST_V6,
        TRANSLATE_FIRST_V6,
        FRAGMENTS_REST,
        FRAGMENTS_REST_V6,
        FRAGMENTS_TO_GUEST_V6,
        FIRST_TO_GUEST_V6,
        NODE_HOST,
    ];
    /// All of a proxy's.
    pub const OF_PROXY: [&str; 13] = [
        TUNNEL_PROXY,
        UNDERLAY_PROXY,
        VPC,
        VPC_EGRESS,
        ANSWER,
        ANSWER_V6,
        FRAGMENTS_PROXY,
        FRAGMENTS_PROXY_V6,
        PUBLIC_OUT,
        PUBLIC_OUT_V6,
        PUBLIC_IN,
        PUBLIC_IN_V6,
        NODE_PROXY,
    ];
}

/// Places of the programs that others end with, in [`names::TAILS`].
pub mod tails {
    use super::programs;

    /// [`programs::TAP_V6`].
    pub const TAP_V6: u32 = 0;
    /// [`programs::TO_GUEST_V6`].
    pub const TO_GUEST_V6: u32 = 1;
    /// [`programs::ERROR_TO_VPC`].
    pub const ERROR_TO_VPC: u32 = 2;
    /// [`programs::ERROR_TO_VPC_V6`].
    pub const ERROR_TO_VPC_V6: u32 = 3;
    /// [`programs::RESOLVE_V6`].
    pub const RESOLVE_V6: u32 = 4;
    /// [`programs::TRANSLATE_V6`].
    pub const TRANSLATE_V6: u32 = 5;
    /// [`programs::ANSWER_V6`].
    pub const ANSWER_V6: u32 = 6;
    /// [`programs::ANSWER`].
    pub const ANSWER: u32 = 7;
    /// [`programs::FRAGMENTS_FIRST_V6`].
    pub const FRAGMENTS_FIRST_V6: u32 = 8;
    /// [`programs::TRANSLATE_FIRST_V6`].
    pub const TRANSLATE_FIRST_V6: u32 = 9;
    /// [`programs::FRAGMENTS_REST_V6`].
    pub const FRAGMENTS_REST_V6: u32 = 10;
    /// [`programs::FRAGMENTS_PROXY_V6`].
    pub const FRAGMENTS_PROXY_V6: u32 = 11;
    /// [`programs::FRAGMENTS_TO_GUEST_V6`].
    pub const FRAGMENTS_TO_GUEST_V6: u32 = 12;
    /// [`programs::FIRST_TO_GUEST_V6`].
    pub const FIRST_TO_GUEST_V6: u32 = 13;
    /// [`programs::NODE_HOST`], [`programs::NODE_PROXY`].
    pub const NODE: u32 = 14;
    /// [`programs::PUBLIC_OUT`].
    pub const PUBLIC_OUT: u32 = 15;
    /// [`programs::PUBLIC_OUT_V6`].
    pub const PUBLIC_OUT_V6: u32 = 16;
    /// [`programs::PUBLIC_IN`].
    pub const PUBLIC_IN: u32 = 17;
    /// [`programs::PUBLIC_IN_V6`].
    pub const PUBLIC_IN_V6: u32 = 18;
    /// All of them.
    pub const ALL: [(u32, &str); 20] = [
        (TAP_V6, programs::TAP_V6),
        (TO_GUEST_V6, programs::TO_GUEST_V6),
        (ERROR_TO_VPC, programs::ERROR_TO_VPC),
        (ERROR_TO_VPC_V6, programs::ERROR_TO_VPC_V6),
        (RESOLVE_V6, programs::RESOLVE_V6),
        (TRANSLATE_V6, programs::TRANSLATE_V6),
        (ANSWER_V6, programs::ANSWER_V6),
        (ANSWER, programs::ANSWER),
        (FRAGMENTS_FIRST_V6, programs::FRAGMENTS_FIRST_V6),
        (TRANSLATE_FIRST_V6, programs::TRANSLATE_FIRST_V6),
        (FRAGMENTS_REST_V6, programs::FRAGMENTS_REST_V6),
        (FRAGMENTS_PROXY_V6, programs::FRAGMENTS_PROXY_V6),
        (FRAGMENTS_TO_GUEST_V6, programs::FRAGMENTS_TO_GUEST_V6),
        (FIRST_TO_GUEST_V6, programs::FIRST_TO_GUEST_V6),
        (PUBLIC_OUT, programs::PUBLIC_OUT),
        (PUBLIC_OUT_V6, programs::PUBLIC_OUT_V6),
        (PUBLIC_IN, programs::PUBLIC_IN),
        (PUBLIC_IN_V6, programs::PUBLIC_IN_V6),
        (NODE, programs::NODE_HOST),
        (NODE, programs::NODE_PROXY),
    ];
    /// Room for them.
    pub const COUNT: u32 = 19;
}

/// The end of a tunnel here: the same for all programs of a host or proxy, in their read-only
/// data under the name `UNDERLAY`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Underlay {
    /// Index of the interface.
    pub ifindex: u32,
    /// Own address: all tunnels' ends are of its family.
    pub address: Ip,
    /// Largest IP packet that the tunnel carries, in bytes.
    pub inner_mtu: u32,
}

/// How many packets were dropped, by the reason's discriminant.
pub type Drops = [u64; Drop::COUNTERS];

/// A slot.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    /// What it is attached to: read as one word.
    pub attachment: Attachment,
    /// Index of its TAP: the key once more. A reader that finds another met an entry that was
    /// recycled under its hands.
    pub ifindex: u32,
    /// Number.
    pub number: u32,
    /// Address of the guest.
    pub address: Ipv4,
    /// MAC address of the guest.
    pub mac: Mac,
    /// What applies to its flows.
    pub guard: Guard,
    /// [`Policy::epoch`] of its policy; 0 without one.
    pub epoch: u32,
}

/// VNI and generation, in one word that is read and written whole.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attachment(pub u64);

impl Attachment {
    /// Attached to a VPC, or detached (VNI 0).
    #[inline]
    pub const fn new(vni: u32, generation: u32) -> Self {
        Self((generation as u64) << 32 | vni as u64)
    }

    /// The VPC; 0 while detached.
    #[inline]
    pub const fn vni(self) -> u32 {
        self.0 as u32
    }

    /// Counts the slot's attachments; a flow carries the one it began under.
    #[inline]
    pub const fn generation(self) -> u32 {
        (self.0 >> 32) as u32
    }
}

/// A VPC on a host.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostVpc {
    /// IPv4 address in the VPC that guests appear as.
    pub shared_address: Ipv4,
    /// First port of this host, of either family's address.
    pub port_base: u32,
    /// How many ports, at least 1.
    pub port_count: u32,
    /// Underlay address of the proxy that owns the addresses, until one claims them.
    pub proxy_address: Ip,
    /// IPv6 address in the VPC that guests appear as; `::`: none.
    pub shared_address_v6: Ip,
}

/// A proxy of a VPC: replies may come from it, and it may claim the shared addresses.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Member {
    /// The VPC.
    pub vni: u32,
    /// Underlay address of the proxy.
    pub proxy: Ip,
}

/// A flow, as its guest sees it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutKey {
    /// Index of the slot's TAP.
    pub ifindex: u32,
    /// The attachment under which it began.
    pub generation: u32,
    /// Address of the peer.
    pub peer: Ip,
    /// The guest's port, or its ICMP echo identifier.
    pub guest_port: Be16,
    /// The peer's port; 0 for ICMP.
    pub peer_port: Be16,
    /// IP protocol.
    pub protocol: u32,
}

impl OutKey {
    /// The mapping of this flow's port, which all flows from there share (RFC 4787, REQ-1): an
    /// entry of its own, under the peer `::`, which no flow has.
    #[inline]
    #[must_use]
    pub const fn mapping(self) -> Self {
        Self { peer: Ip::UNSPECIFIED, peer_port: Be16(0), ..self }
    }

    /// The claim of a port for this flow.
    #[inline(always)]
    #[must_use]
    pub const fn claim(&self, vni: u32, port: Be16) -> InKey {
        let Self { peer, peer_port, protocol, .. } = *self;
        InKey { vni, peer, peer_port, port, protocol }
    }

    /// What its entry is known by, should the memory be another's meanwhile. Two keys have the same
    /// one time in 65,536.
    #[inline(always)]
    #[must_use]
    pub const fn check(&self) -> u16 {
        let [a, b, c, d] = self.peer.0;
        let ports = (self.guest_port.0 as u32) << 16 | self.peer_port.0 as u32;
        let owner = self.ifindex.rotate_left(8) ^ self.generation ^ self.protocol;
        let mixed = (a ^ b ^ c ^ d ^ ports.rotate_left(5) ^ owner).wrapping_mul(0x9e37_79b1);
        (mixed >> 16) as u16
    }

    /// Whether it is that of a mapping.
    #[inline]
    pub const fn is_mapping(&self) -> bool {
        self.peer.is_unspecified()
    }
}

/// How much went one way; a segmented packet (GSO) counts as what is made of it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// IP packets.
    pub packets: u64,
    /// Their bytes, IP headers included.
    pub bytes: u64,
}

impl Traffic {
    /// Nothing yet.
    pub const NONE: Self = Self { packets: 0, bytes: 0 };
}

/// What is known of a flow.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flow {
    /// Changed by compare-and-exchange only.
    pub state: FlowState,
    /// The VPC.
    pub vni: u32,
    /// The port that stands for the guest's on the shared address.
    pub port: Be16,
    /// [`OutKey::check`] of its key.
    pub check: u16,
    /// What the guest sent; a mapping's is zero.
    pub sent: Traffic,
    /// The sequence number after the guest's FIN, and after the peer's, if they sent one.
    pub ends: [u32; 2],
    /// The tick in which it began.
    pub began: u32,
    /// [`Slot::epoch`] when it was last judged.
    pub judged: u32,
}

/// A flow, as its peer sees it. Inserting it claims the port.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InKey {
    /// The VPC.
    pub vni: u32,
    /// Address of the peer.
    pub peer: Ip,
    /// The peer's port; 0 for ICMP.
    pub peer_port: Be16,
    /// The port on the shared address, or the ICMP echo identifier.
    pub port: Be16,
    /// IP protocol.
    pub protocol: u32,
}

impl InKey {
    /// The key of the flow that has this claim.
    #[inline(always)]
    #[must_use]
    pub const fn flow(&self, claim: &InFlow) -> OutKey {
        let Self { peer, peer_port, protocol, .. } = *self;
        let InFlow { ifindex, generation, guest_port, .. } = *claim;
        OutKey { ifindex, generation, peer, guest_port, peer_port, protocol }
    }
}

/// Where a reply goes.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InFlow {
    /// Index of the slot's TAP.
    pub ifindex: u32,
    /// The attachment under which the flow began.
    pub generation: u32,
    /// The tick in which a reply last refreshed the flow.
    pub refreshed: u32,
    /// The guest's port, or its ICMP echo identifier.
    pub guest_port: Be16,
    /// The low bits of [`Slot::epoch`] when the flow was last found to be allowed.
    pub judged: u16,
    /// What the guest received.
    pub received: Traffic,
}

/// A slot, as the link-local services reach it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ServiceSlot {
    /// When its guest has used up less than its [`Rate`](crate::rate::Rate), in nanoseconds of
    /// `CLOCK_MONOTONIC`.
    pub due_ns: u64,
    /// Index of its TAP.
    pub ifindex: u32,
    /// Zero.
    pub reserved: u32,
}

/// A shared address on an interface of a proxy.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InterfaceKey {
    /// Index of the interface.
    pub ifindex: u32,
    /// The address; `::`: whichever comes in there that is no shared one, of either family.
    pub address: Ip,
}

/// A shared address of a VPC on a proxy.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProxyVpc {
    /// VNI.
    pub vni: u32,
    /// Index of the interface in the VPC.
    pub ifindex: u32,
    /// Address in the VPC that guests appear as.
    pub shared_address: Ipv4,
    /// The VPC's CIDR: its address.
    pub network: Ipv4,
    /// The VPC's CIDR: its mask.
    pub mask: Ipv4,
    /// Next hop outside the CIDR; 0.0.0.0: none.
    pub gateway: Ipv4,
    /// Index of its counters in `DROPS`, from 1.
    pub scope: u32,
    /// MAC address of the interface.
    pub mac: Mac,
    /// 1: another proxy owns the shared addresses, and this one answers nobody who asks for them; 0:
    /// it is the owner.
    pub standby: u8,
    /// What packets may be for that come from here, and go back into the tunnel:
    /// [`Self::SIBLINGS`] and [`Self::PUBLIC`].
    pub hairpins: u8,
    /// [`Claim::sequence`] of the claim by which it is the owner, or was last; 0: it never was.
    pub claim: u32,
    /// When the VPC's route table was last changed: no other change of any table has the same. 0:
    /// there is none, but the CIDR and the gateway.
    pub table: u64,
    /// The same in IPv6.
    pub v6: ProxyVpcV6,
}

impl ProxyVpc {
    /// There are other shared addresses on the interface.
    pub const SIBLINGS: u8 = 1;
    /// There is a public address.
    pub const PUBLIC: u8 = 2;

    /// Whether this is one of its shared addresses.
    #[inline(always)]
    #[must_use]
    pub const fn is_at(&self, address: Ip) -> bool {
        address.is(Ip::v4(self.shared_address)) || address.is(self.v6.shared_address)
    }
}

/// What came from a VPC, to a proxy's MAC address.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reached {
    /// When the last packet came, in nanoseconds of `CLOCK_MONOTONIC_COARSE`; 0: none did.
    pub at_ns: u64,
    /// Who answered last who was asked for by ARP; 0.0.0.0: nobody did.
    pub neighbour: Ipv4,
    /// MAC address of that one.
    pub mac: Mac,
    /// Zero.
    pub reserved: [u16; 3],
}

/// What a proxy knows of a VPC's IPv6; `::` where there is none.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProxyVpcV6 {
    /// Address in the VPC that guests appear as.
    pub shared_address: Ip,
    /// The VPC's CIDR: its address.
    pub network: Ip,
    /// The VPC's CIDR: its mask.
    pub mask: Ip,
    /// Next hop outside the CIDR.
    pub gateway: Ip,
}

impl ProxyVpcV6 {
    /// There is none.
    pub const NONE: Self = Self {
        shared_address: Ip::UNSPECIFIED,
        network: Ip::UNSPECIFIED,
        mask: Ip::UNSPECIFIED,
        gateway: Ip::UNSPECIFIED,
    };
}

/// A block of ports, on the VPC's addresses of both families: its host is the same on both.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockKey {
    /// The VPC.
    pub vni: u32,
    /// The shared IPv4 address.
    pub shared_address: Ipv4,
    /// [`nat::block_of`](crate::nat::block_of) its ports.
    pub block: u32,
}

/// Flows that seem to have ended, for the program that decides about them and removes them: the
/// packet that it runs on, which the kernel limits to less than a page.
#[repr(C, packed(2))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sweep {
    /// The kernel wants an Ethernet header; zeroes.
    pub ethernet: [u8; 14],
    /// How long flows may be idle.
    pub timers: Timers,
    /// How many of `keys` are meant.
    pub count: u32,
    /// Out: flows that ended and were removed.
    pub expired: u32,
    /// Out: flows of former attachments, removed.
    pub stale: u32,
    /// The flows.
    pub keys: [OutKey; Self::KEYS],
}

impl Sweep {
    /// How many flows a packet holds: few, since the processor takes no other packets meanwhile.
    pub const KEYS: usize = 16;

    /// Without flows.
    pub const EMPTY: Self = Self {
        ethernet: [0; 14],
        timers: Timers::DEFAULT,
        count: 0,
        expired: 0,
        stale: 0,
        keys: [OutKey {
            ifindex: 0,
            generation: 0,
            peer: Ip::UNSPECIFIED,
            guest_port: Be16(0),
            peer_port: Be16(0),
            protocol: 0,
        }; Self::KEYS],
    };
}

impl Sweep {
    /// Its bytes, as the program gets them.
    pub const fn to_bytes(self) -> [u8; size_of::<Self>()] {
        // SAFETY: integers only, no padding (checked below): every byte is initialised.
        unsafe { core::mem::transmute(self) }
    }

    /// From its bytes, as the program leaves them.
    pub const fn from_bytes(bytes: [u8; size_of::<Self>()]) -> Self {
        // SAFETY: integers only: any bytes are a value.
        unsafe { core::mem::transmute(bytes) }
    }
}

#[cfg(feature = "user")]
mod pod {
    macro_rules! pod {
        ($($name:ident),+) => {
            $(
                // SAFETY: `repr(C)`, integers only, no padding (checked below): every byte of a
                // value is initialised, and any bytes are a value.
                unsafe impl aya::Pod for super::$name {}
            )+
        };
    }
    pod!(
        Slot,
        HostVpc,
        Member,
        Claim,
        OutKey,
        Flow,
        InKey,
        InFlow,
        ProxyVpc,
        InterfaceKey,
        BlockKey,
        Underlay,
        Timers,
        Cell,
        Datagram,
        Ipv4,
        Ip,
        RouteKey,
        Route,
        ServiceSlot,
        Policy,
        Limits,
        Held
    );
}

/// Fails to compile if a type has another size than its fields together.
macro_rules! without_padding {
    ($($name:ident = $size:literal),+) => {
        $(const _: () = assert!(size_of::<$name>() == $size);)+
    };
}
without_padding!(
    Underlay = 24,
    Timers = 28,
    Cell = 8,
    Datagram = 96,
    Slot = 32,
    HostVpc = 44,
    Member = 20,
    Claim = 20,
    OutKey = 32,
    Traffic = 16,
    Flow = 48,
    InKey = 28,
    InFlow = 32,
    ProxyVpc = 112,
    InterfaceKey = 20,
    Reached = 24,
    BlockKey = 12,
    Sweep = 566,
    RouteKey = 20,
    Route = 20,
    CachedRoute = 48,
    ServiceSlot = 16,
    Rule = 48,
    Policy = 6164,
    Limits = 88,
    Held = 16
);
