//! Network namespaces held by a descriptor.

use std::ffi::OsStr;
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use nix::sched::{CloneFlags, setns, unshare};

/// A network namespace that lives as long as this value, its clones, and the processes in it.
#[derive(Clone, Debug)]
pub struct Namespace {
    name: String,
    fd: Arc<OwnedFd>,
}

impl Namespace {
    /// Makes an empty namespace with its loopback interface up.
    ///
    /// The name is for messages only.
    pub fn new(name: &str) -> Result<Self> {
        let fd = std::thread::spawn(|| -> Result<OwnedFd> {
            unshare(CloneFlags::CLONE_NEWNET)
                .context("cannot make a network namespace: this needs root (CAP_SYS_ADMIN)")?;
            Ok(File::open("/proc/thread-self/ns/net")?.into())
        })
        .join()
        .expect("the thread does not panic")?;
        let namespace = Self { name: name.to_owned(), fd: Arc::new(fd) };
        namespace.ip("link set lo up")?;
        Ok(namespace)
    }

    /// The name it was made with.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A path other processes of this user can open as long as this process lives.
    pub fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.fd.as_raw_fd())
    }

    /// Runs `f` in the namespace, on a thread of its own: sockets it opens stay in the namespace.
    pub fn run<T: Send>(&self, f: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            scope
                .spawn(|| {
                    setns(self.fd.as_fd(), CloneFlags::CLONE_NEWNET)
                        .expect("a namespace that was made here can be entered");
                    f()
                })
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Spawns a thread that stays in the namespace.
    pub fn spawn<T: Send + 'static>(
        &self,
        f: impl FnOnce() -> T + Send + 'static,
    ) -> std::thread::JoinHandle<T> {
        let fd = self.fd.clone();
        std::thread::spawn(move || {
            setns(fd.as_fd(), CloneFlags::CLONE_NEWNET)
                .expect("a namespace that was made here can be entered");
            drop(fd);
            f()
        })
    }

    /// A command that will run in the namespace.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(program);
        let fd = self.fd.clone();
        // SAFETY: setns is a single system call: safe between fork and exec.
        unsafe {
            command.pre_exec(move || {
                setns(fd.as_fd(), CloneFlags::CLONE_NEWNET).map_err(std::io::Error::from)
            });
        }
        command
    }

    /// Runs `ip` with these words in the namespace.
    pub fn ip(&self, words: &str) -> Result<()> {
        let output = self
            .command("ip")
            .args(words.split_whitespace())
            .output()
            .context("cannot run `ip` (package iproute2)")?;
        if !output.status.success() {
            let stderr = String::from_utf8_lossy(&output.stderr);
            bail!("`ip {words}` in {}: {}", self.name, stderr.trim());
        }
        Ok(())
    }

    /// Runs `ip` once for all of these lines.
    pub fn ip_batch(&self, lines: impl Iterator<Item = String>) -> Result<()> {
        let mut command = self.command("ip");
        command.args(["-batch", "-"]).stdin(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().context("cannot run `ip` (package iproute2)")?;
        let mut input = child.stdin.take().context("it has an input")?;
        let lines: String = lines.map(|line| line + "\n").collect();
        // One that fails reads no further, and says why.
        input.write_all(lines.as_bytes()).ok();
        drop(input);
        let output = child.wait_with_output()?;
        let error = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "`ip -batch` in {}: {}", self.name, error.trim());
        Ok(())
    }

    /// Writes a switch of the namespace's network, such as `ipv4/ip_forward`.
    pub fn sysctl(&self, path: &str, value: &str) -> Result<()> {
        let path = format!("/proc/sys/net/{path}");
        self.run(|| std::fs::write(&path, value)).with_context(|| format!("cannot write {path}"))
    }

    /// Loads a ruleset by `nft`.
    pub fn nft(&self, ruleset: &str) -> Result<()> {
        let output = self
            .command("nft")
            .arg(ruleset)
            .output()
            .context("cannot run `nft` (package nftables)")?;
        if !output.status.success() {
            bail!("`nft` in {}: {}", self.name, String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(())
    }

    /// How many packets interfaces of the namespace lost, or got that were another machine's, as far as
    /// the kernel counts them.
    pub fn lost(&self) -> Result<u64> {
        let output = self.command("ip").args(["-s", "-s", "-j", "link", "show"]).output()?;
        let links: serde_json::Value = serde_json::from_slice(&output.stdout)?;
        let of = |link: &serde_json::Value| {
            let [rx, tx] = ["rx", "tx"].map(|way| &link["stats64"][way]);
            let all = [&rx["dropped"], &rx["otherhost"], &tx["dropped"]];
            all.iter().filter_map(|count| count.as_u64()).sum::<u64>()
        };
        Ok(links.as_array().into_iter().flatten().map(of).sum())
    }

    /// Runs `ip -o` with these words and returns its lines.
    pub fn ip_lines(&self, words: &str) -> Result<Vec<String>> {
        let output = self.command("ip").arg("-o").args(words.split_whitespace()).output()?;
        Ok(String::from_utf8_lossy(&output.stdout).lines().map(str::to_owned).collect())
    }
}

/// Gives an interface, which is without, IPv6: a link-local address at once, and no heed of routers.
pub fn enable_v6(namespace: &Namespace, interface: &str) -> Result<()> {
    for (name, value) in [("accept_ra", "0"), ("accept_dad", "0"), ("disable_ipv6", "0")] {
        namespace.sysctl(&format!("ipv6/conf/{interface}/{name}"), value)?;
    }
    Ok(())
}

/// Connects two namespaces by a veth pair and brings both ends up, without IPv6 on them.
pub fn veth(a: &Namespace, a_name: &str, b: &Namespace, b_name: &str) -> Result<()> {
    a.ip(&format!("link add {a_name} type veth peer name {b_name} netns {}", b.path()))?;
    for (namespace, name) in [(a, a_name), (b, b_name)] {
        let path = format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6");
        // A kernel without IPv6 has no such file, and needs none.
        namespace.run(|| std::fs::write(path, "1")).ok();
        namespace.ip(&format!("link set {name} up"))?;
    }
    Ok(())
}
