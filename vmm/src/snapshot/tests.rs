use std::io::Write;

use kvm_bindings::{kvm_regs, kvm_sregs};
use warren_abi::microvm::{CODE_ADDRESS, DATA_ADDRESS};

use super::file::{CHECKSUM, FIXED};
use super::*;
use crate::cpu::{CpuState, missing_features};
use crate::devices::mmio::Mmio;
use crate::devices::net::Net;
use crate::devices::vsock;

/// BLAKE3 of an encoded [`Header`] whose fields all differ from each other, of a file, and of the
/// header of a diff. If the test fails the format has changed: raise [`VERSION`], then put the new
/// values here.
const LAYOUT: (u32, [&str; 3]) = (
    4,
    [
        "5f28cf3a38c1e19982eaf516431d270b84758bdb5bb48d7ac09e1514e228c45e",
        "e58d06588745f5f3a48e3f5bb17f57f15726470ecb7f3551946e1d20a71d6db9",
        "62a85c8d7025e89a7581b13b9330718c7c2f3f74ebd917b3f21432427f1610a4",
    ],
);

/// ABI of the guests in them: a newer one of today's guests is no other format.
const GUEST_ABI: u32 = 3;

fn header() -> Header {
    Header {
        abi_version: GUEST_ABI,
        cpu_features: vec!["avx2".to_owned()],
        machine: machine(),
        disk: Some([14; 32]),
        working_set: vec![Pages { first: 10, count: 11 }],
        in_place: vec![Pages { first: 12, count: 13 }],
    }
}

/// Sizes that no image of a function has, and pages where such an image has none.
#[test]
fn a_diff_whose_function_cannot_be_is_refused() {
    let (mib, data, code) = (1u64 << 20, DATA_ADDRESS / PAGE, CODE_ADDRESS / PAGE);
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("diff");
    let keep = |function, pages: &[u64]| {
        let header = postcard::to_allocvec(&diff::Header { function, ..diff_header() }).unwrap();
        let mut bytes = Vec::new();
        file::write(&mut bytes, &diff::KIND, &header, &vec![0; pages.len()], &ram()).unwrap();
        let numbers = bytes[FIXED + header.len()..].chunks_exact_mut(4);
        for (number, page) in numbers.zip(pages) {
            number.copy_from_slice(&(*page as u32).to_le_bytes());
        }
        bytes.truncate(bytes.len() - CHECKSUM);
        let checksum = *blake3::hash(&bytes).as_bytes();
        bytes.extend(checksum);
        diff::keep(&path, bytes, None)
    };
    assert!(keep(None, &[1, 1023]).is_ok());
    assert!(keep(Some((2 * mib, mib)), &[1, data, data + 511, code, code + 255]).is_ok());
    for (function, pages) in [
        (None, vec![1024]),
        (None, vec![data]),
        (None, vec![code]),
        (Some((2 * mib, mib)), vec![data - 1]),
        (Some((2 * mib, mib)), vec![data + 512]),
        (Some((2 * mib, mib)), vec![code + 256]),
        (Some((2 * mib, mib)), vec![u64::from(u32::MAX)]),
        (Some((0, mib)), vec![]),
        (Some((mib, 0)), vec![]),
        (Some((mib + 1, mib)), vec![]),
        (Some((mib, u64::MAX)), vec![]),
        (Some((1 << 40, mib)), vec![]),
    ] {
        let refused = keep(function, &pages);
        let what = format!("{function:?} with {pages:?}: {refused:?}");
        assert!(matches!(refused, Err(SnapshotError::Malformed { .. })), "{what}");
    }
}

fn diff_header() -> diff::Header {
    diff::Header {
        abi_version: GUEST_ABI,
        template: [14; 32],
        machine: machine(),
        function: Some((15, 16)),
        working_set: vec![Pages { first: 17, count: 18 }],
        in_place: vec![Pages { first: 19, count: 20 }],
    }
}

fn machine() -> MachineState {
    MachineState {
        cpu: CpuState {
            regs: kvm_regs { rax: 1, rip: 2, rflags: 3, ..kvm_regs::default() },
            sregs: kvm_sregs { cr3: 4, efer: 5, ..kvm_sregs::default() },
            xcr0: 6,
            xsave: vec![7, 8, 9],
        },
        net: Net::new().save(),
        vsock: Mmio::new(&vsock::KIND).save(),
        linux: None,
    }
}

fn ram() -> GuestRam {
    let bytes = 4 << 20;
    let ram = GuestRam::map(&Part::new("test", bytes).unwrap().memfd, bytes, true).unwrap();
    for (page, byte) in [(0, 1u8), (7, 2), (1023, 3)] {
        ram.all().write_slice(&[byte; 4096], GuestAddress(page * PAGE)).unwrap();
    }
    ram
}

/// A directory with a template, and with keys.
struct Files {
    directory: tempfile::TempDir,
    sources: Sources,
}

impl Files {
    fn new(header: &Header, encrypted: bool) -> Self {
        let directory = tempfile::tempdir().unwrap();
        for name in ["key", "other"] {
            let key = *blake3::hash(name.as_bytes()).as_bytes();
            std::fs::write(directory.path().join(name), key).unwrap();
        }
        let template = directory.path().join("template");
        let key = encrypted.then(|| directory.path().join("key"));
        let sources = Sources { key, ..Sources::from(template) };
        let files = Self { directory, sources };
        write(&files.sources.template, header, &ram(), files.key().as_ref()).unwrap();
        files
    }

    fn key(&self) -> Option<Key> {
        Key::read_optional(self.sources.key.as_deref()).unwrap()
    }

    fn bytes(&self) -> Vec<u8> {
        std::fs::read(&self.sources.template).unwrap()
    }

    fn verify(&self, bytes: &[u8]) -> Result<Content, SnapshotError> {
        let key = self.key();
        Content::verify(&self.sources.template, &KIND, bytes.to_vec(), key.as_ref())
    }

    fn with_key(&self, name: Option<&str>) -> Result<Template, SnapshotError> {
        let key = name.map(|name| self.directory.path().join(name));
        read(&Sources { key, ..self.sources.clone() }, None)
    }
}

#[test]
fn layout_changes_only_together_with_the_version() {
    let header_hash = blake3::hash(&postcard::to_allocvec(&header()).unwrap());
    let file = Files::new(&header(), false).bytes();
    let file_hash = blake3::hash(&file);
    let diff_hash = blake3::hash(&postcard::to_allocvec(&diff_header()).unwrap());
    let hashes = [header_hash, file_hash, diff_hash].map(|hash| hash.to_hex().to_string());
    assert_eq!((VERSION, hashes.each_ref().map(String::as_str)), LAYOUT);
}

#[test]
fn what_was_written_is_read_into_sealed_memory() {
    for encrypted in [false, true] {
        let files = Files::new(&header(), encrypted);
        let template = read(&files.sources, None).unwrap();
        assert_eq!(template.header, header());
        let memory = &template.memory;
        let clone = GuestRam::clone_of(memory).unwrap();
        for (page, byte) in [(0, 1u8), (1, 0), (7, 2), (1023, 3)] {
            let address = GuestAddress(page * PAGE + 17);
            assert_eq!(clone.all().read_obj::<u8>(address).unwrap(), byte);
            // A clone's change is its own.
            clone.all().write_obj(99u8, address).unwrap();
        }
        let again = GuestRam::clone_of(memory).unwrap();
        assert_eq!(again.all().read_obj::<u8>(GuestAddress(17)).unwrap(), 1);
        let Part { memfd, bytes } = &memory.base;
        assert!(GuestRam::map(memfd, *bytes, true).is_err());
        assert!((&mut &*memfd).write_all(b"x").is_err());
        assert!(memfd.set_len(1).is_err());
    }
}

#[test]
fn an_encrypted_one_shows_nothing_and_no_two_are_alike() {
    let (plain, one, two) =
        (Files::new(&header(), false), Files::new(&header(), true), Files::new(&header(), true));
    let has = |files: &Files, what: &[u8]| files.bytes().windows(what.len()).any(|w| w == what);
    for content in [b"avx2".as_slice(), &[2; 64], &[3; 64]] {
        assert!(has(&plain, content) && !has(&one, content));
    }
    // The lengths in the head are the same, and nothing else is.
    let (one, two) = (one.bytes(), two.bytes());
    assert_eq!(one[..32], two[..32]);
    let same = one[32..].iter().zip(&two[32..]).filter(|(one, two)| one == two).count();
    assert!(same < one.len() / 64, "{same} of {} bytes are the same", one.len());
}

#[test]
fn keys_that_do_not_fit_are_refused_with_the_remedy() {
    let (plain, encrypted) = (Files::new(&header(), false), Files::new(&header(), true));
    assert!(plain.with_key(None).is_ok() && encrypted.with_key(Some("key")).is_ok());
    let complain = |refused: Result<Template, SnapshotError>, file: &str, remedy: &str| {
        let error = refused.unwrap_err().to_string();
        assert!(error.contains(file) && error.contains(remedy), "{error}");
    };
    complain(encrypted.with_key(None), "template", "name the file of its key with --key");
    complain(encrypted.with_key(Some("other")), "template", "encrypted with another key");
    complain(plain.with_key(Some("key")), "template", "leave --key out");
    complain(plain.with_key(Some("nowhere")), "nowhere", "No such file");
    for length in [0, 31, 33, 64] {
        std::fs::write(plain.directory.path().join("short"), vec![1; length]).unwrap();
        complain(plain.with_key(Some("short")), "short", "a key has 32 bytes");
    }
}

#[test]
fn every_truncation_is_refused() {
    for encrypted in [false, true] {
        let files = Files::new(&header(), encrypted);
        let whole = files.bytes();
        for length in (0..whole.len()).rev() {
            match files.verify(&whole[..length]) {
                Err(SnapshotError::Other { .. }) => assert!(length < 8),
                Err(SnapshotError::Length { found, .. }) => assert_eq!(found, length as u64),
                other => panic!("{length} bytes: {:?}", other.err()),
            }
        }
        let mut longer = whole;
        longer.push(0);
        assert!(matches!(files.verify(&longer), Err(SnapshotError::Length { .. })));
    }
}

/// Each bit in the head, one in each byte of the rest.
fn flips(length: usize) -> impl Iterator<Item = (usize, u8)> {
    let bits = |byte| if byte < 512 { 0..8 } else { byte % 8..byte % 8 + 1 };
    (0..length).flat_map(move |byte| bits(byte).map(move |bit| (byte, 1 << bit)))
}

#[test]
fn every_flipped_bit_is_refused() {
    for encrypted in [false, true] {
        let files = Files::new(&header(), encrypted);
        let mut file = files.bytes();
        for (byte, bit) in flips(file.len()) {
            file[byte] ^= bit;
            match (byte, files.verify(&file)) {
                (0..8, Err(SnapshotError::Other { .. }))
                | (8..12, Err(SnapshotError::Version { .. }))
                | (12..16 | 24..32, Err(SnapshotError::Length { .. }))
                | (12..24 | 32.., Err(SnapshotError::Checksum { .. })) => {}
                (_, result) => panic!("byte {byte} bit {bit}: {:?}", result.err()),
            }
            file[byte] ^= bit;
        }
        assert!(files.verify(&file).is_ok());
    }
}

/// Who forges can make a checksum right; the tag he cannot.
#[test]
fn every_flipped_bit_under_a_right_checksum_is_refused_without_the_key() {
    let files = Files::new(&header(), true);
    let good = files.bytes();
    for (byte, bit) in flips(good.len() - CHECKSUM) {
        let mut file = good[..good.len() - CHECKSUM].to_vec();
        file[byte] ^= bit;
        let checksum = *blake3::hash(&file).as_bytes();
        file.extend(checksum);
        match (byte, files.verify(&file)) {
            (0..8, Err(SnapshotError::Other { .. }))
            | (8..12, Err(SnapshotError::Version { .. }))
            | (12..16 | 24..32, Err(SnapshotError::Length { .. }))
            | (12..16, Err(SnapshotError::Malformed { .. }))
            | (16..24 | 32.., Err(SnapshotError::WrongKey { .. })) => {}
            (_, result) => panic!("byte {byte} bit {bit}: {:?}", result.err()),
        }
    }
}

#[test]
fn other_versions_are_named() {
    let files = Files::new(&Header { abi_version: 77, ..header() }, false);
    let error = read(&files.sources, None).unwrap_err();
    let SnapshotError::Version { found: 77, newest: ABI_VERSION, .. } = &error else {
        panic!("{error}");
    };
    assert!(error.to_string().contains("guest ABI 77"), "{error}");
}

/// A checksum proves no more than that nothing was damaged.
#[test]
fn content_that_cannot_be_is_refused_even_with_the_right_checksum() {
    let files = Files::new(&header(), false);
    let good = files.bytes();
    let header_len = u32::from_le_bytes(good[24..28].try_into().unwrap()) as usize;
    let with = |edit: &dyn Fn(&mut Vec<u8>)| {
        let mut file = good[..good.len() - CHECKSUM].to_vec();
        edit(&mut file);
        let checksum = *blake3::hash(&file).as_bytes();
        file.extend(checksum);
        let checked = files.verify(&file).and_then(|content| {
            content.check_pages(&[])?;
            super::header(&content)
        });
        checked.err()
    };
    assert!(with(&|_| {}).is_none());
    let first_page = FIXED + header_len;
    let outside = with(&|file| file[first_page..first_page + 4].fill(0xff));
    assert!(matches!(outside, Some(SnapshotError::Malformed { .. })), "{outside:?}");
    let huge = with(&|file| file[16..24].fill(0x7f));
    assert!(matches!(huge, Some(SnapshotError::Malformed { .. })), "{huge:?}");
    let cipher = with(&|file| file[12..16].fill(0xff));
    assert!(matches!(cipher, Some(SnapshotError::Malformed { .. })), "{cipher:?}");
    let header = with(&|file| file[FIXED..first_page].fill(0xff));
    assert!(matches!(header, Some(SnapshotError::Malformed { .. })), "{header:?}");
}

#[test]
fn unknown_processor_features_count_as_missing() {
    assert!(missing_features(&[]).is_empty());
    assert_eq!(missing_features(&["amx-9".to_owned()]), ["amx-9"]);
}
