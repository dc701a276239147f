//! A function's image: a diff of a template with the function in regions of its own.

mod common;

use std::path::{Path, PathBuf};
use std::time::Duration;

use common::{Host, guest, identity, kvm, make_image, make_template, tap};
use tempfile::TempDir;
use warren_vmm::client::{MicroVm, invoke};
use warren_vmm::control::{EndReason, Tier};
use warren_vmm::snapshot::Sources;

const FUNCTION: &str = "warren-function-counter";

async fn call(microvm: &MicroVm, request: &[u8]) -> String {
    let reply = invoke(microvm.path(), request, Duration::from_secs(10)).await.unwrap();
    String::from_utf8(reply).unwrap()
}

/// A template, and an image of the function that counts.
struct Image {
    directory: TempDir,
    sources: Sources,
}

impl Image {
    fn new(key: Option<&[u8]>) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let at = |name| directory.path().join(name);
        if let Some(key) = key {
            std::fs::write(at("key"), key).unwrap();
        }
        let template = Sources { key: key.map(|_| at("key")), ..Sources::from(at("template")) };
        make_template("warren-guest", &template);
        make_image(&template, &guest(FUNCTION), &at("image")).unwrap();
        let sources = Sources { diff: Some(at("image")), ..template };
        Self { directory, sources }
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("image")
    }

    async fn host(&self) -> Host {
        Host::with(|config| config.sources = self.sources.clone()).await
    }
}

async fn stop(mut microvm: MicroVm) {
    assert_eq!(microvm.stop().await.unwrap(), EndReason::Stopped);
}

#[tokio::test]
async fn clones_of_an_image_answer_with_its_function_and_see_nothing_of_each_other() {
    if !kvm() {
        return;
    }
    for key in [None, Some([7; 32].as_slice())] {
        let image = Image::new(key);
        let host = image.host().await;
        let mut clones = Vec::new();
        for (slot, tier) in [(1, Tier::Shell), (2, Tier::Loaded), (3, Tier::Parked)] {
            let mut clone = host.forked(slot, tap("w0").unwrap(), tier).await;
            clone.advance(tier).await.unwrap();
            clone.release(&identity(slot)).await.unwrap();
            clones.push(clone);
        }
        for clone in &clones {
            let name = format!("slot {}", clone.slot());
            assert_eq!(call(clone, name.as_bytes()).await, "hello 0 ");
            assert_eq!(call(clone, &vec![b'x'; 1 << 20]).await, format!("hello 1 {name}"));
            assert_eq!(call(clone, b"").await, format!("hello 2 {}", "x".repeat(256)));
        }
        for clone in clones {
            stop(clone).await;
        }
    }
}

#[tokio::test]
async fn a_recycled_clone_has_called_its_function_never() {
    if !kvm() {
        return;
    }
    let image = Image::new(None);
    let host = image.host().await;
    let mut clone = host.running(1).await;
    for round in 0..3 {
        assert_eq!(call(&clone, b"secret").await, "hello 0 ", "round {round}");
        assert_eq!(call(&clone, b"").await, "hello 1 secret");
        clone.recycle().await.unwrap();
        clone.release(&identity(1)).await.unwrap();
    }
    stop(clone).await;
}

#[tokio::test]
async fn a_branch_of_an_image_goes_on_counting() {
    if !kvm() {
        return;
    }
    let image = Image::new(None);
    let host = image.host().await;
    let mut origin = host.running(1).await;
    assert_eq!(call(&origin, b"first").await, "hello 0 ");
    let snapshot = image.directory.path().join("snapshot");
    origin.snapshot(&snapshot, None).await.unwrap();
    let sources = Sources { diff: Some(snapshot), ..image.sources.clone() };
    let branch = Host::with(|config| config.sources = sources).await;
    let clone = branch.running(2).await;
    assert_eq!(call(&clone, b"second").await, "hello 1 first");
    assert_eq!(call(&clone, b"").await, "hello 2 second");
    assert_eq!(call(&origin, b"").await, "hello 1 first");
    stop(clone).await;
    stop(origin).await;
}

/// The pages of code are one set for all, and nobody's own.
#[tokio::test]
async fn clones_share_the_code() {
    if !kvm() {
        return;
    }
    let image = Image::new(None);
    let host = image.host().await;
    let (one, two) = (host.running(1).await, host.running(2).await);
    for clone in [&one, &two] {
        call(clone, b"").await;
        let maps = std::fs::read_to_string(format!("/proc/{}/smaps", clone.pid())).unwrap();
        let mut lines = maps.lines().skip_while(|line| !line.contains("/memfd:warren-code"));
        assert!(lines.next().is_some(), "no code is mapped:\n{maps}");
        let kib = |name: &str| -> u64 {
            let line = lines.clone().find(|line| line.starts_with(name)).unwrap();
            line.split_whitespace().nth(1).unwrap().parse().unwrap()
        };
        assert_eq!((kib("Private_Dirty:"), kib("Anonymous:")), (0, 0));
        assert!(kib("Size:") > 0);
    }
    stop(one).await;
    stop(two).await;
}

/// The inode of a microVM's mapping of this name.
fn inode(microvm: &MicroVm, name: &str) -> String {
    let maps = std::fs::read_to_string(format!("/proc/{}/maps", microvm.pid())).unwrap();
    let line = maps.lines().find(|line| line.contains(name));
    line.unwrap_or_else(|| panic!("{name}:\n{maps}")).split_whitespace().nth(4).unwrap().to_owned()
}

/// A template's memory is there once for all of its images, as what it is: nothing is copied.
#[tokio::test]
async fn images_share_the_memory_of_their_template() {
    if !kvm() {
        return;
    }
    let image = Image::new(None);
    let (of_template, of_other) = (image.host().await, image.host().await);
    let memory = of_template.zygote.memory();
    let sharing = Host::sharing(&memory, |config| config.sources = image.sources.clone()).await;
    // What was made with another template is not taken for this one's.
    let stranger = Image::new(Some(&[1; 32]));
    let strange = Host::sharing(&memory, |config| config.sources = stranger.sources.clone()).await;
    let (one, two) = (of_template.running(1).await, of_other.running(1).await);
    let (three, four) = (sharing.running(1).await, strange.running(1).await);
    for name in ["memfd:warren-memory", "memfd:warren-changes", "memfd:warren-data"] {
        let is_shared = name == "memfd:warren-memory";
        assert_eq!(inode(&one, name) == inode(&three, name), is_shared, "{name}");
        assert!(inode(&one, name) != inode(&two, name) && inode(&one, name) != inode(&four, name));
    }
    for clone in [one, two, three, four] {
        assert_eq!(call(&clone, b"").await, "hello 0 ");
        stop(clone).await;
    }
}

#[tokio::test]
async fn walls_of_a_function_end_its_microvm() {
    if !kvm() {
        return;
    }
    let image = Image::new(None);
    let host = image.host().await;
    // Exceptions are told by what the processor says; where nothing is, KVM itself gives up.
    for (request, expected) in [
        ("write code", "exception 14"),
        ("run data", "exception 14"),
        ("read beyond", "0x5ffff000"),
        ("reply too long", "longer than there is room for"),
    ] {
        let mut clone = host.running(1).await;
        let called = invoke(clone.path(), request.as_bytes(), Duration::from_secs(10)).await;
        assert!(called.is_err(), "{request}: {called:?}");
        let reason = clone.ended().await.to_string();
        assert!(reason.contains(expected), "{request}: {reason}");
    }
    let clone = host.running(1).await;
    assert_eq!(call(&clone, b"").await, "hello 0 ");
    stop(clone).await;
}

#[tokio::test]
async fn what_is_no_function_is_refused_with_the_reason() {
    if !kvm() {
        return;
    }
    let image = Image::new(None);
    let template = Sources { diff: None, ..image.sources.clone() };
    let output = image.directory.path().join("other");
    let refused = |function: &Path, expected: &str| {
        let error = make_image(&template, function, &output).unwrap_err();
        assert!(error.contains(expected), "{error}");
        assert!(!output.exists());
    };
    refused(&guest("warren-guest"), "is out of place");
    refused(&template.template, "nor a static x86-64 ELF executable");
    refused(Path::new("/nowhere"), "No such file");
    let mut cut = std::fs::read(guest(FUNCTION)).unwrap();
    cut.truncate(cut.len() / 8);
    let file = image.directory.path().join("cut");
    std::fs::write(&file, cut).unwrap();
    refused(&file, "nor a static x86-64 ELF executable");
    assert!(image.path().exists());
}
