//! Components: functions that answer HTTP. What `tests/component` does when a test asks for it.

#[path = "../common/mod.rs"]
mod common;

mod caller;
mod calls;
mod endings;
mod images;
mod network;
mod wasi;

use tempfile::TempDir;
use warren_function::package::{self, Manifest, Package};
use warren_vmm::client::MicroVm;
use warren_vmm::control::EndReason;
use warren_vmm::snapshot::Sources;

use common::{Host, guest, make_image_with, make_template};

/// A template and an image of the component.
struct Function {
    _directory: TempDir,
    sources: Sources,
}

impl Function {
    /// As it was packaged.
    fn new() -> Self {
        Self::with(|_| {})
    }

    /// With other options.
    fn with(change: impl FnOnce(&mut Manifest)) -> Self {
        Self::make(change).unwrap()
    }

    /// The same, or what is said when the image cannot be made.
    fn make(change: impl FnOnce(&mut Manifest)) -> Result<Self, String> {
        let path = guest("warren-guest").with_file_name("test-component.package");
        let bytes = std::fs::read(&path)
            .unwrap_or_else(|error| panic!("{}: {error}: run `cargo xtask build`", path.display()));
        let package = Package::parse(&bytes).unwrap();
        let file = |file: &package::File| (file.path.clone(), package.contents(file).to_vec());
        let files = package.manifest.files.iter().map(file).collect();
        let mut manifest = package.manifest.clone();
        change(&mut manifest);
        let changed = package::write(manifest, package.code(), files).unwrap();

        let directory = tempfile::tempdir().unwrap();
        let at = |name| directory.path().join(name);
        std::fs::write(at("package"), changed).unwrap();
        let template = Sources::from(at("template"));
        make_template("warren-runtime", &template);
        make_image_with(&template, &at("package"), &at("image"), &[])?;
        let sources = Sources { diff: Some(at("image")), ..template };
        Ok(Self { _directory: directory, sources })
    }

    async fn host(&self) -> Host {
        Host::with(|config| config.sources = self.sources.clone()).await
    }
}

async fn stop(mut microvm: MicroVm) {
    assert_eq!(microvm.stop().await.unwrap(), EndReason::Stopped);
}
