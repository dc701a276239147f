//! What the host's daemon takes for the microVM in a slot, while a guest with a kernel's TCP is
//! there: iperf3 and `PostgreSQL`'s clients run in no microVM of ours.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command};
use std::thread;

use anyhow::{Context, Result};
use warren_vmm::client::MicroVm;
use warren_vmm::control::{
    CONTROL_LINE, Reply, Request, Status, encode_frame, socket_path, take_frame,
};

/// Answers for a microVM until it is dropped.
pub struct StandIn {
    process: Child,
}

impl StandIn {
    /// Ends the microVM in a slot, and says of itself what that one said. The daemon must not run:
    /// it would free the slot.
    pub async fn replace(run_dir: &Path, slot: u32) -> Result<Self> {
        let (mut microvm, status) = MicroVm::connect(run_dir, slot).await?;
        microvm.stop().await?;
        let path = socket_path(run_dir, slot);
        std::fs::remove_file(&path).ok();
        let listener = UnixListener::bind(&path)
            .with_context(|| format!("cannot listen at {}", path.display()))?;
        // Whoever would kill the microVM hits this.
        let process = Command::new("sleep").arg("infinity").spawn()?;
        let status = Status { pid: process.id() as i32, ..status };
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let status = status.clone();
                thread::spawn(move || answer(stream, &status));
            }
        });
        Ok(Self { process })
    }
}

impl Drop for StandIn {
    fn drop(&mut self) {
        self.process.kill().ok();
        self.process.wait().ok();
    }
}

/// Says who it is whenever it is asked, until the other side goes or wants more than that.
fn answer(mut stream: UnixStream, status: &Status) -> Option<()> {
    let mut greeting = [0; CONTROL_LINE.len()];
    stream.read_exact(&mut greeting).ok()?;
    let (mut received, mut buffer) = (Vec::new(), [0; 256]);
    loop {
        let length = stream.read(&mut buffer).ok().filter(|&length| length > 0)?;
        received.extend_from_slice(&buffer[..length]);
        while let Some(request) = take_frame::<Request>(&mut received).ok()? {
            if request != Request::Status {
                return None;
            }
            stream.write_all(&encode_frame(&Reply::Status(status.clone()))).ok()?;
        }
    }
}
