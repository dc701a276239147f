//! Touching what the release will need, while nobody waits for it.

use std::arch::asm;
use std::fs;
use std::ops::Range;
use std::ptr;

use crate::network::Link;

const PAGE: usize = 4096;

/// Larger mappings are not touched, in bytes: what the agent needs is small.
const LARGEST: usize = 4 << 20;

/// Reads every page of the agent's code, writes to every page of its data, heap and stack, and goes
/// the way through the kernel that the network's identity will go. In a clone the host then maps or
/// copies these pages now, and not one fault after the other when somebody waits.
///
/// What fails here fails again at the release, where it is told.
pub fn run(link: &Link) {
    let _ = link.rehearse();
    let maps = fs::read_to_string("/proc/self/maps").unwrap_or_default();
    for mapping in maps.lines().filter_map(parse) {
        for page in mapping.pages.step_by(PAGE) {
            if mapping.is_writable {
                // SAFETY: `lock or` with 0 leaves what is there as it is, whoever owns it, and the
                // kernel says that the page is mapped and writable. No compiler knows of this access.
                unsafe { asm!("lock or byte ptr [{}], 0", in(reg) page, options(nostack)) };
            } else {
                // SAFETY: the kernel says that the page is mapped and readable, and any byte is a u8.
                unsafe { ptr::read_volatile(page as *const u8) };
            }
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
struct Mapping {
    pages: Range<usize>,
    is_writable: bool,
}

/// A line of /proc/self/maps (`proc_pid_maps(5)`), if it is memory that may be touched.
fn parse(line: &str) -> Option<Mapping> {
    let mut words = line.split_ascii_whitespace();
    let (start, end) = words.next()?.split_once('-')?;
    let rights = words.next()?;
    let name = words.nth(3).unwrap_or_default();
    let start = usize::from_str_radix(start, 16).ok()?;
    let end = usize::from_str_radix(end, 16).ok()?;
    // Shared memory is the VMM's, and the kernel's own mappings have pages that cannot be read.
    let is_own = rights.ends_with('p') && !name.starts_with("[v");
    let is_small = end.checked_sub(start)? <= LARGEST;
    (is_own && is_small && rights.starts_with('r'))
        .then(|| Mapping { pages: start..end, is_writable: rights.contains('w') })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_memory_is_touched_and_nothing_else() {
        let text = "7f0000001000-7f0000003000 r-xp 00001000 00:02 7    /init";
        let pages = 0x7f00_0000_1000..0x7f00_0000_3000;
        assert_eq!(parse(text), Some(Mapping { pages, is_writable: false }));
        let heap = "1000-3000 rw-p 00000000 00:00 0    [heap]";
        assert_eq!(parse(heap), Some(Mapping { pages: 0x1000..0x3000, is_writable: true }));
        let bss = "1000-3000 rw-p 00000000 00:00 0";
        assert_eq!(parse(bss), Some(Mapping { pages: 0x1000..0x3000, is_writable: true }));
        for other in [
            "1000-2000 r--s 00010000 00:06 5    /dev/mem",
            "1000-2000 r--p 00000000 00:00 0    [vvar]",
            "1000-2000 ---p 00000000 00:00 0",
            "1000-900000 rw-p 00000000 00:00 0",
            "2000-1000 rw-p 00000000 00:00 0",
            "nonsense",
            "",
        ] {
            assert_eq!(parse(other), None, "{other}");
        }
    }
}
