//! Why the data path dropped a packet.

/// Declares [`Drop`] together with its names, so that neither can lack an entry.
macro_rules! reasons {
    ($($(#[$doc:meta])* $variant:ident = $name:literal,)+) => {
        /// Why a packet was dropped. The discriminant is the index of its counter.
        #[repr(u32)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Drop {
            $($(#[$doc])* $variant,)+
        }

        impl Drop {
            /// Every reason, in the order of the discriminants.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)+];

            /// The name that people and programs know it by, such as `spoofed-address`.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)+
                }
            }
        }
    };
}

reasons! {
    /// A helper of the kernel failed: out of memory, mostly.
    Internal = "internal",
    /// Shorter than its headers say.
    Truncated = "truncated",
    /// Neither IPv4, IPv6 nor ARP, or behind a VLAN tag.
    NotIpv4 = "not-ipv4",
    /// The IP header's version or length is wrong, or IPv4's carries options.
    BadHeader = "bad-header",
    /// A fragment whose datagram's first one did not come in time, or was itself dropped.
    Fragment = "fragment",
    /// Neither TCP, UDP nor an ICMP echo message or error.
    UnsupportedProtocol = "unsupported-protocol",
    /// An ICMP error that is not translated, or is about no flow.
    IcmpError = "icmp-error",
    /// The source MAC address is not the slot's.
    SpoofedMac = "spoofed-mac",
    /// The source address is not the slot's, nor, in the tunnel, the VPC's shared address.
    SpoofedAddress = "spoofed-address",
    /// An ARP message whose sender is not the slot.
    SpoofedArp = "spoofed-arp",
    /// An ARP message that is neither a request that is answered nor a reply that is awaited.
    UnexpectedArp = "unexpected-arp",
    /// The slot is in no VPC.
    Detached = "detached",
    /// The VPC of the slot or of the tunnel's VNI is not known here.
    UnknownVpc = "unknown-vpc",
    /// The destination is not a unicast address that a VPC could have.
    BadDestination = "bad-destination",
    /// The time to live ended here.
    TtlExceeded = "ttl-exceeded",
    /// It does not fit into the underlay's MTU.
    TooBig = "too-big",
    /// It belongs to no flow, and cannot begin one.
    NoFlow = "no-flow",
    /// It belongs to a flow of a former tenant of the slot.
    StaleFlow = "stale-flow",
    /// No port was found for a new flow.
    PortsExhausted = "ports-exhausted",
    /// The table of flows is full.
    FlowsExhausted = "flows-exhausted",
    /// It came through the tunnel from another than the VPC's proxy.
    NotFromProxy = "not-from-proxy",
    /// It came through the tunnel from a host that does not hold the port block.
    NotBlockHolder = "not-block-holder",
    /// No host holds the port block.
    NoBlockHolder = "no-block-holder",
    /// The VPC has no route there.
    NoRoute = "no-route",
    /// Came from the VPC, but not for its shared address.
    NotSharedAddress = "not-shared-address",
    /// The checksum of an ICMP error, or of the IP header that it embeds, is wrong.
    BadChecksum = "bad-checksum",
    /// The VPC's route table has a blackhole there.
    Blackhole = "blackhole",
    /// To the address of a link-local service, but not to its port.
    NoService = "no-service",
    /// More packets to the link-local services than a slot may send.
    ServiceRate = "service-rate",
    /// An ICMP error of the data path's own, beyond their rate: what it would have been about is
    /// counted as well.
    AnswerRate = "answer-rate",
    /// The slot's security groups do not allow the flow.
    Denied = "denied",
    /// An IPv6 header that is followed by an extension header other than a fragment's.
    ExtensionHeader = "extension-header",
    /// UDP over IPv6 without a checksum.
    NoChecksum = "no-checksum",
    /// The VPC has no shared address of the packet's family.
    NoSharedAddress = "no-shared-address",
    /// A neighbour discovery message whose sender is not the slot.
    SpoofedNd = "spoofed-nd",
    /// A neighbour discovery message that is neither answered nor awaited, or not well-formed.
    UnexpectedNd = "unexpected-nd",
    /// A fragment that is empty, too short, beyond the largest packet, or over the first one.
    BadFragment = "bad-fragment",
    /// A datagram of which fragments may still come gave way to another one of the same slot or VPC:
    /// there were too many. This counts datagrams; those fragments are dropped for `fragment`.
    FragmentsExhausted = "fragments-exhausted",
    /// More packets than the slot may send or receive a second.
    PacketLimit = "packet-limit",
    /// More bits than the slot may send or receive a second.
    BitLimit = "bit-limit",
    /// More flows than the slot may begin a second.
    NewFlowLimit = "new-flow-limit",
    /// A flow more than the slot may have at one time.
    FlowLimit = "flow-limit",
    /// A port more than the slot may have at one time.
    PortLimit = "port-limit",
    /// Somebody asked for the VPC's shared address, which another proxy owns.
    Standby = "standby",
    /// Came from the VPC in a frame for another MAC address: a switch floods.
    OtherMac = "other-mac",
}

impl Drop {
    /// Counters per scope: more than there are reasons, so that pinned counters outlive a new one.
    pub const COUNTERS: usize = 64;

    /// The reason with this discriminant.
    pub fn from_index(index: u32) -> Option<Self> {
        Self::ALL.get(index as usize).copied()
    }
}

impl core::fmt::Display for Drop {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(self.name())
    }
}

const _: () = assert!(Drop::ALL.len() <= Drop::COUNTERS);
