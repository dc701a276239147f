//! Templates and diffs that former versions made are cloned still.
//!
//! The files beside this are what warren-vmm of that version wrote: a template of `warren-guest` with
//! 16 MiB, and a diff of its clone that remembered "kept by version 3".

#[path = "../common/mod.rs"]
mod common;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use common::{Host, guest, identity, kvm, make_image};
use tempfile::TempDir;
use warren_abi::probe::{Operation, Outcome, Reply, Request, decode, encode};
use warren_vmm::client::{MicroVm, invoke};
use warren_vmm::control::EndReason;
use warren_vmm::snapshot::Sources;

const KEPT: &[u8] = b"kept by version 3";

/// The files of version 3, unpacked; none if the processor is not of the kind that they were made on.
fn version_3() -> Option<(TempDir, Sources)> {
    let directory = tempfile::tempdir().unwrap();
    let unpack = |name: &str| -> PathBuf {
        let packed = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/formats/{name}.xz"));
        let output = Command::new("xz").arg("-dc").arg(&packed).output().unwrap();
        assert!(output.status.success(), "{}: {output:?}", packed.display());
        let path = directory.path().join(name);
        std::fs::write(&path, output.stdout).unwrap();
        path
    };
    let sources = Sources { diff: Some(unpack("diff-3")), ..Sources::from(unpack("template-3")) };
    match warren_vmm::template::load(&sources, None) {
        Err(error) if error.to_string().contains("this processor lacks") => {
            eprintln!("!!! SKIPPED: {error} !!!");
            None
        }
        loaded => {
            loaded.unwrap();
            Some((directory, sources))
        }
    }
}

async fn probe(microvm: &MicroVm, operation: Operation) -> Outcome {
    let request = encode(&Request { operation, timeout_ms: 1000 });
    let reply = invoke(microvm.path(), &request, Duration::from_secs(10)).await.unwrap();
    decode::<Reply>(&reply).unwrap().outcome.unwrap()
}

async fn host(sources: &Sources) -> Host {
    Host::with(|config| config.sources = sources.clone()).await
}

async fn end(mut microvm: MicroVm) {
    assert_eq!(microvm.stop().await.unwrap(), EndReason::Stopped);
}

#[tokio::test]
async fn a_template_of_version_3_is_cloned_recycled_and_branched() {
    if !kvm() {
        return;
    }
    let Some((directory, sources)) = version_3() else { return };
    let template = Sources { diff: None, ..sources };
    let host_of_template = host(&template).await;
    let mut microvm = host_of_template.running(1).await;
    microvm.recycle().await.unwrap();
    microvm.release(&identity(1)).await.unwrap();
    let remember = Operation::Remember { bytes: b"by this version".to_vec() };
    assert_eq!(probe(&microvm, remember).await, Outcome::Done);
    let diff = directory.path().join("diff");
    microvm.snapshot(&diff, None).await.unwrap();
    end(microvm).await;

    let branch = host(&Sources { diff: Some(diff), ..template }).await;
    let clone = branch.running(2).await;
    let recalled = probe(&clone, Operation::Recall).await;
    assert_eq!(recalled, Outcome::Recalled(b"by this version".to_vec()));
    end(clone).await;
}

#[tokio::test]
async fn a_diff_of_version_3_is_cloned_and_saved_anew() {
    if !kvm() {
        return;
    }
    let Some((directory, sources)) = version_3() else { return };
    let host_of_diff = host(&sources).await;
    let mut clone = host_of_diff.running(1).await;
    assert_eq!(probe(&clone, Operation::Recall).await, Outcome::Recalled(KEPT.to_vec()));
    let diff = directory.path().join("diff");
    clone.snapshot(&diff, None).await.unwrap();
    end(clone).await;
    let branch = host(&Sources { diff: Some(diff), ..sources }).await;
    let clone = branch.running(2).await;
    assert_eq!(probe(&clone, Operation::Recall).await, Outcome::Recalled(KEPT.to_vec()));
    end(clone).await;
}

#[tokio::test]
async fn a_guest_of_version_3_takes_no_function() {
    if !kvm() {
        return;
    }
    let Some((directory, sources)) = version_3() else { return };
    let template = Sources { diff: None, ..sources };
    let output = directory.path().join("image");
    let refused = make_image(&template, &guest("warren-function-counter"), &output).unwrap_err();
    assert!(refused.contains("its guest takes no function: make it anew"), "{refused}");
    assert!(!output.exists());
}
