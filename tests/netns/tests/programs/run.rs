//! The programs, loaded, with maps of their own.

use std::net::Ipv6Addr;
use std::path::PathBuf;

use aya::maps::{HashMap, MapData, PerCpuArray, ProgramArray};
use aya::programs::{SchedClassifier, TestRun, TestRunOptions};
use aya::{Ebpf, EbpfLoader, Pod};
use warren_abi::drop::Drop;
use warren_abi::fragment::{DATAGRAMS, Tag};
use warren_abi::maps::{
    Attachment, BlockKey, Drops, Guard, HostVpc, InterfaceKey, ProxyVpc, ProxyVpcV6, Slot,
    Underlay, names, programs, tails,
};
use warren_abi::nat::BLOCK_PORTS;
use warren_abi::wire::{Ip, Ipv4, Mac, slot_address, slot_mac};
use warren_netns::fleet::built;

/// Verdicts (`TC_ACT_*` of `linux/pkt_cls.h`).
pub const OK: i32 = 0;
pub const SHOT: i32 = 2;
pub const REDIRECT: i32 = 7;

/// Frames come from the loopback device, which stands for a TAP and for the interface in a VPC.
pub const IFINDEX: u32 = 1;
/// Number of the slot, and scope of the VPC on the proxy.
pub const SCOPE: u32 = 1;
pub const VNI: u32 = 100;
pub const MTU: u16 = 1450;
pub const SHARED: [u8; 4] = [10, 0, 0, 100];
pub const PEER: [u8; 4] = [10, 0, 0, 10];
const NETWORK_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0);
pub const SHARED_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0x100);
pub const PEER_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0x10);
pub const HOST: [u8; 4] = [192, 0, 2, 1];
pub const PROXY: [u8; 4] = [192, 0, 2, 2];
/// MAC address of the proxy's interface in the VPC.
pub const VPC_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
/// First port that the host holds.
pub const PORT: u16 = 4096;

/// MAC address of the slot's guest.
pub fn guest_mac() -> [u8; 6] {
    slot_mac(SCOPE).octets()
}

/// Address of the slot's guest.
pub fn guest_address() -> [u8; 4] {
    slot_address(SCOPE).expect("there is a slot 1").octets()
}

/// All programs of the object, and the maps of a host and of a proxy in one.
pub struct Programs {
    ebpf: Ebpf,
    drops: PerCpuArray<MapData, Drops>,
    /// Its entries go when nobody has it open.
    _tails: ProgramArray<MapData>,
    counted: [Vec<u64>; 2],
}

/// What became of a frame.
#[derive(Debug)]
pub struct Run {
    /// The program's verdict.
    pub action: i32,
    /// The frame as it was left.
    pub frame: Vec<u8>,
    /// What was counted meanwhile, and under which scope.
    pub drops: Vec<(u32, Drop)>,
}

impl Run {
    /// What the frame was tagged with. One that goes on in the tunnel still begins with the
    /// addresses that it came with, and an answer with the one that it came from: they may look like a
    /// tag.
    pub fn tag(&self, came: &[u8]) -> Option<Tag> {
        let (goes_on, answers) = (self.frame[..12] == came[..12], self.frame[..6] == came[6..12]);
        Tag::of_frame(&self.frame).filter(|_| !goes_on && !answers)
    }
}

impl Programs {
    pub fn load() -> Self {
        let underlay =
            Underlay { ifindex: IFINDEX, address: HOST_ADDRESS, inner_mtu: u32::from(MTU) };
        let path: PathBuf = built("warren-ebpf.o").expect("the programs are built");
        let object = std::fs::read(path).expect("the programs can be read");
        let mut loader = EbpfLoader::new();
        loader.btf(None).override_global("UNDERLAY", &underlay, true);
        for name in [names::CT_OUT, names::CT_IN, names::BLOCKS] {
            loader.map_max_entries(name, 1 << 17);
        }
        for name in [names::DROPS, names::ANSWERS, names::LIMITS, names::HELD] {
            loader.map_max_entries(name, SCOPE + 1);
        }
        loader.map_max_entries(names::DATAGRAMS, DATAGRAMS);
        loader.map_max_entries(names::INTERFACES, 3);
        let mut ebpf = loader.load(&object).expect("the object can be loaded");
        let mut refused = String::new();
        for name in programs::OF_HOST.into_iter().chain(programs::OF_PROXY) {
            let program = program(&mut ebpf, name);
            if program.fd().is_ok() {
                // Both have it.
                continue;
            }
            if let Err(error) = program.load() {
                refused += &format!("{name}: {}\n", outline(&error.to_string()));
            }
        }
        assert!(refused.is_empty(), "the kernel refuses programs:\n{refused}");
        let map = ebpf.take_map(names::TAILS).expect("the map is there");
        let mut map = ProgramArray::try_from(map).expect("it is of programs");
        for (place, name) in tails::ALL {
            let program = program(&mut ebpf, name).fd().expect("it is loaded");
            map.set(place, program, 0).expect("it has room");
        }
        let drops = ebpf.take_map(names::DROPS).expect("the map is there");
        let drops = PerCpuArray::try_from(drops).expect("it is per CPU");
        let mut all = Self { ebpf, drops, _tails: map, counted: [const { Vec::new() }; 2] };
        all.fill();
        all.counted = [0, SCOPE].map(|scope| all.read(scope));
        all
    }

    fn fill(&mut self) {
        let slot = Slot {
            attachment: Attachment::new(VNI, 1),
            ifindex: IFINDEX,
            number: SCOPE,
            address: guest_address_abi(),
            mac: slot_mac(SCOPE),
            guard: Guard::NONE,
            epoch: 0,
        };
        self.insert(names::SLOTS, IFINDEX, slot);
        let shared_address = Ipv4::new(SHARED);
        let vpc = HostVpc {
            shared_address,
            port_base: u32::from(PORT),
            port_count: 1024,
            proxy_address: Ip::v4(Ipv4::new(PROXY)),
            shared_address_v6: SHARED_V6.into(),
        };
        self.insert(names::HOST_VPCS, VNI, vpc);
        let vpc = ProxyVpc {
            vni: VNI,
            ifindex: IFINDEX,
            shared_address,
            network: Ipv4::new([10, 0, 0, 0]),
            mask: Ipv4::new([255, 255, 255, 0]),
            gateway: Ipv4(0),
            scope: SCOPE,
            mac: Mac::new(VPC_MAC),
            standby: 0,
            hairpins: 0,
            claim: 0,
            table: 0,
            v6: ProxyVpcV6 {
                shared_address: SHARED_V6.into(),
                network: NETWORK_V6.into(),
                mask: Ip([!0, !0, 0, 0]),
                gateway: Ip::UNSPECIFIED,
            },
        };
        for address in [Ip::v4(shared_address), SHARED_V6.into(), Ip::UNSPECIFIED] {
            self.insert(names::INTERFACES, InterfaceKey { ifindex: IFINDEX, address }, VNI);
        }
        self.insert(names::PROXY_VPCS, VNI, vpc);
        let first = u32::from(PORT) / BLOCK_PORTS;
        for block in first..first + 1024 / BLOCK_PORTS {
            let key = BlockKey { vni: VNI, shared_address, block };
            self.insert(names::BLOCKS, key, HOST_ADDRESS);
        }
    }

    fn insert<K: Pod, V: Pod>(&mut self, name: &str, key: K, value: V) {
        let map = self.ebpf.map_mut(name).expect("the map is there");
        let mut map = HashMap::<&mut MapData, K, V>::try_from(map).expect("it is a hash map");
        map.insert(key, value, 0).expect("it has room");
    }

    /// How many entries a hash map holds.
    pub fn count<K: Pod, V: Pod>(&self, name: &str) -> usize {
        let map = self.ebpf.map(name).expect("the map is there");
        let map = HashMap::<&MapData, K, V>::try_from(map).expect("it is of these types");
        map.keys().count()
    }

    /// A program.
    pub fn program(&mut self, name: &'static str) -> &mut SchedClassifier {
        program(&mut self.ebpf, name)
    }

    /// Runs a program on a frame of at least [`SHORTEST`](crate::frames::SHORTEST) bytes.
    pub fn run(&mut self, name: &'static str, frame: &[u8]) -> Run {
        let mut out = vec![0; 4096];
        let mut options = TestRunOptions::new();
        options.data_in = Some(frame);
        options.data_out = Some(&mut out);
        let result = program(&mut self.ebpf, name).test_run(options);
        let result =
            result.unwrap_or_else(|error| panic!("{name}, {} bytes: {error}", frame.len()));
        out.truncate(result.data_size_out as usize);
        let mut drops = Vec::new();
        for (index, scope) in [0, SCOPE].into_iter().enumerate() {
            let now = self.read(scope);
            for (reason, (now, before)) in (0..).zip(now.iter().zip(&self.counted[index])) {
                let reason = || Drop::from_index(reason).expect("only reasons are counted");
                drops.extend((*before..*now).map(|_| (scope, reason())));
            }
            self.counted[index] = now;
        }
        Run { action: result.return_value as i32, frame: out, drops }
    }

    fn read(&self, scope: u32) -> Vec<u64> {
        let values = self.drops.get(&scope, 0).expect("the counters can be read");
        (0..Drop::COUNTERS).map(|reason| values.iter().map(|drops| drops[reason]).sum()).collect()
    }
}

const HOST_ADDRESS: Ip = Ip::v4(Ipv4::new(HOST));

fn guest_address_abi() -> Ipv4 {
    Ipv4::new(guest_address())
}

fn program<'a>(ebpf: &'a mut Ebpf, name: &'static str) -> &'a mut SchedClassifier {
    let program = ebpf.program_mut(name).unwrap_or_else(|| panic!("{name} is missing"));
    program.try_into().expect("it is of tc")
}

/// The beginning and the end of a text, which may be a verifier's of many thousand lines.
fn outline(text: &str) -> String {
    const END: usize = 5;
    let lines: Vec<_> = text.lines().collect();
    match lines.split_first() {
        Some((first, rest)) if rest.len() > END => {
            format!("{first}\n...\n{}", rest[rest.len() - END..].join("\n"))
        }
        _ => text.to_owned(),
    }
}
