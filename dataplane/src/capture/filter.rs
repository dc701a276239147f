//! Filters as of tcpdump, compiled by libpcap.

use std::fmt::{self, Debug, Formatter};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use nix::errno::Errno;
use pcap::{BpfProgram, Linktype};
use warren_abi::wire::VXLAN_PORT;

/// Longest filter, in bytes.
const MAX_LENGTH: usize = 4096;

/// Why a text is no filter; libpcap's own words, if it is not too long.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("filter: {0}")]
pub struct InvalidFilter(String);

/// A filter of Ethernet frames.
pub struct Filter(BpfProgram);

impl Debug for Filter {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.debug_struct("Filter").finish_non_exhaustive()
    }
}

impl Filter {
    /// Compiles an expression (pcap-filter(7)); the empty one matches every frame. It may take as
    /// long as looking up a host's name does.
    pub fn compile(expression: &str) -> Result<Self, InvalidFilter> {
        if expression.len() > MAX_LENGTH {
            return Err(InvalidFilter(format!("it is longer than {MAX_LENGTH} bytes")));
        }
        let compiled = pcap::Capture::dead(Linktype::ETHERNET)
            .and_then(|capture| capture.compile(expression, true));
        compiled.map(Self).map_err(|error| match error {
            pcap::Error::PcapError(message) => InvalidFilter(message),
            error => InvalidFilter(error.to_string()),
        })
    }

    /// What the tunnel of a VPC carries (RFC 7348), over an underlay of IPv4 or IPv6.
    pub fn tunnel(vni: u32, is_v4: bool) -> Result<Self, InvalidFilter> {
        let is_vni = |field| format!("{field} & 0xffffff00 = {}", vni << 8);
        Self::compile(&if is_v4 {
            format!("ip and udp dst port {VXLAN_PORT} and {}", is_vni("udp[12:4]"))
        } else {
            // libpcap does not look behind the headers of IPv6 by itself.
            format!("ip6[6] = 17 and ip6[42:2] = {VXLAN_PORT} and {}", is_vni("ip6[52:4]"))
        })
    }

    /// Whether a frame is wanted.
    pub fn matches(&self, frame: &[u8]) -> bool {
        self.0.filter(frame)
    }

    /// Lets the kernel apply it to what a socket receives.
    pub(super) fn attach(&self, socket: BorrowedFd<'_>) -> io::Result<()> {
        let instructions = self.0.get_instructions();
        let program = libc::sock_fprog {
            len: u16::try_from(instructions.len()).map_err(io::Error::other)?,
            filter: instructions.as_ptr().cast_mut().cast(),
        };
        // SAFETY: the program is as long as it says; libpcap's `struct bpf_insn` is laid out as the
        // kernel's `struct sock_filter`, and the kernel only reads it.
        let result = unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_ATTACH_FILTER,
                (&raw const program).cast(),
                size_of_val(&program) as libc::socklen_t,
            )
        };
        Errno::result(result)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{inside, tunnelled};
    use super::*;

    #[test]
    fn frames_are_matched_as_tcpdump_does() {
        let frame = inside();
        let matches = |filter| Filter::compile(filter).unwrap().matches(&frame);
        for filter in ["", "udp", "udp port 53", "src host 169.254.0.9", "dst 10.1.0.20 and ip"] {
            assert!(matches(filter), "{filter}");
        }
        assert!(!matches("tcp") && !matches("udp port 54"));
    }

    #[test]
    fn what_is_wrong_is_told_in_libpcaps_words() {
        let problem = |filter: &str| Filter::compile(filter).unwrap_err().to_string();
        assert!(problem("tcp prot 80").contains("syntax error"), "{}", problem("tcp prot 80"));
        assert!(problem("port 70000").contains("70000"), "{}", problem("port 70000"));
        assert!(problem(&"ip or ".repeat(1000)).contains("longer than 4096"));
        Filter::compile("ip\0").unwrap_err();
    }

    #[test]
    fn a_tunnel_is_told_by_its_vni() {
        for end in ["192.0.2.1", "2001:db8::1"] {
            let (end, is_v4) = (end.parse().unwrap(), !end.contains(':'));
            let frame = tunnelled(end, 0x01_0203, &inside());
            assert!(Filter::tunnel(0x01_0203, is_v4).unwrap().matches(&frame), "{end}");
            assert!(!Filter::tunnel(0x01_0204, is_v4).unwrap().matches(&frame), "{end}");
            assert!(!Filter::tunnel(0x01_0203, !is_v4).unwrap().matches(&frame), "{end}");
        }
    }
}
