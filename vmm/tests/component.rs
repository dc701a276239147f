//! Components: functions that answer HTTP.

mod common;

use std::path::{Path, PathBuf};

use common::{Host, kvm};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use warren_vmm::snapshot::Sources;

/// Sends a request to a microVM's function, and returns everything that comes back.
async fn exchange(path: &Path, request: &str) -> String {
    let mut stream = UnixStream::connect(path).await.unwrap();
    stream.write_all(format!("CONNECT 80\n{request}").as_bytes()).await.unwrap();
    let mut reply = Vec::new();
    stream.read_to_end(&mut reply).await.unwrap();
    String::from_utf8_lossy(&reply).into_owned()
}

#[tokio::test]
async fn smoke() {
    if !kvm() {
        return;
    }
    let dir = PathBuf::from(std::env::var("FN").unwrap());
    let name = std::env::var("LANG_NAME").unwrap();
    let sources = Sources {
        diff: Some(dir.join(format!("{name}.image"))),
        ..Sources::from(dir.join("runtime.template"))
    };
    let host = Host::with(|config| config.sources = sources).await;
    let mut vm = host.running(1).await;
    println!("{}", vm.path().display());
    let r = exchange(vm.path(), "GET /a HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await;
    println!("{r}");
    if std::env::var("WAIT").is_ok() {
        println!("{:?}", vm.ended().await);
    }
}
