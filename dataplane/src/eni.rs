//! How addresses come to this proxy's interfaces: Linux announces them; in a cloud, whose network
//! sends packets by its own tables, a command of the operator's moves them.

use std::collections::HashMap;
use std::io;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::Serialize;
use tokio::runtime::Handle;
use tokio::sync::Semaphore;
use warren_proto::hook::Hook;

use crate::announce::{Announcement, Announcer};

/// How long the command may take.
const LIMIT: Duration = Duration::from_secs(30);
/// After a failure, it is tried again so much later.
const AGAIN: Duration = Duration::from_secs(1);
/// So many run at a time.
const AT_ONCE: usize = 16;

/// Addresses that are this proxy's by its claim.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Assignment {
    /// VNI of the shared address.
    pub vni: u32,
    /// Number of the claim: the higher, the later.
    pub claim: u32,
    /// The addresses, and where they are to be.
    pub announcement: Announcement,
}

/// Has a network send addresses' packets here.
pub trait EniProvider: Send + Sync {
    /// These addresses are this proxy's now. Called again for the same claim, at growing intervals and
    /// whenever others may have taken themselves for the owner. Must not block.
    ///
    /// # Errors
    /// If that is known at once.
    fn assign(&self, assignment: &Assignment) -> io::Result<()>;

    /// A VNI's addresses are this proxy's no longer.
    fn leave(&self, vni: u32);
}

/// What Linux networks understand: ARP announcements and unsolicited neighbour advertisements.
#[derive(Debug)]
pub struct Linux(Announcer);

impl Linux {
    /// In the calling thread's network namespace. Needs `CAP_NET_RAW`.
    ///
    /// # Errors
    /// If the socket cannot be opened.
    pub fn open() -> io::Result<Self> {
        Announcer::open().map(Self)
    }
}

impl EniProvider for Linux {
    fn assign(&self, assignment: &Assignment) -> io::Result<()> {
        self.0.send(&assignment.announcement)
    }

    fn leave(&self, _: u32) {}
}

/// A command, run once for each claim, and again until it succeeds or the claim is over.
pub struct Exec {
    hook: Hook,
    /// This proxy's address in the underlay.
    proxy: IpAddr,
    runtime: Handle,
    /// The claims for which it runs, or has.
    claims: Arc<Mutex<HashMap<u32, u32>>>,
    places: Arc<Semaphore>,
}

/// What the command reads.
#[derive(Serialize)]
struct Message {
    version: u32,
    action: &'static str,
    vni: u32,
    claim: u32,
    interface: String,
    mac: String,
    addresses: Vec<IpAddr>,
    proxy: IpAddr,
}

impl Exec {
    /// Runs `hook` on the runtime of the calling task, for the proxy of this underlay address.
    pub fn new(hook: Hook, proxy: IpAddr) -> Self {
        let (claims, places) = (Arc::default(), Arc::new(Semaphore::new(AT_ONCE)));
        Self { hook, proxy, runtime: Handle::current(), claims, places }
    }
}

fn lock(claims: &Mutex<HashMap<u32, u32>>) -> MutexGuard<'_, HashMap<u32, u32>> {
    claims.lock().unwrap_or_else(PoisonError::into_inner)
}

impl EniProvider for Exec {
    fn assign(&self, assignment: &Assignment) -> io::Result<()> {
        let Assignment { vni, claim, announcement } = assignment.clone();
        if lock(&self.claims).insert(vni, claim) == Some(claim) {
            return Ok(());
        }
        let name = nix::net::if_::if_indextoname(announcement.ifindex)?;
        let message = Message {
            version: 1,
            action: "assign",
            vni,
            claim,
            interface: name.to_string_lossy().into_owned(),
            mac: announcement.mac.map(|octet| format!("{octet:02x}")).join(":"),
            addresses: announcement.addresses,
            proxy: self.proxy,
        };
        let (hook, claims, places) = (self.hook.clone(), self.claims.clone(), self.places.clone());
        self.runtime.spawn(async move {
            while lock(&claims).get(&vni) == Some(&claim) {
                // It is never closed.
                let place = places.acquire().await;
                match hook.run(&message, LIMIT).await {
                    Ok(()) => return tracing::info!(vni, claim, "addresses assigned"),
                    Err(error) => tracing::error!(vni, claim, %error, "addresses not assigned"),
                }
                drop(place);
                tokio::time::sleep(AGAIN).await;
            }
        });
        Ok(())
    }

    fn leave(&self, vni: u32) {
        lock(&self.claims).remove(&vni);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A command that fails the first time for each claim, and then notes what it was told.
    fn exec(directory: &std::path::Path) -> Exec {
        let script = format!(
            "cd {}; m=$(cat); c=$(echo \"$m\" | sed 's/.*\"claim\":\\([0-9]*\\).*/\\1/'); \
             test -e tried-$c || {{ touch tried-$c; echo not yet >&2; exit 1; }}; \
             echo \"$m\" >> told",
            directory.display()
        );
        let words = Vec::from(["/bin/sh", "-c", script.as_str()].map(str::to_owned));
        Exec::new(words.try_into().unwrap(), IpAddr::from([192, 0, 2, 101]))
    }

    fn assignment(vni: u32, claim: u32) -> Assignment {
        let addresses = vec![IpAddr::from([10, 0, 0, 100])];
        // The loopback device, which is there everywhere.
        Assignment { vni, claim, announcement: Announcement { ifindex: 1, mac: [2; 6], addresses } }
    }

    async fn told(directory: &std::path::Path, count: usize) -> Vec<serde_json::Value> {
        for _ in 0..2000 {
            let text = std::fs::read_to_string(directory.join("told")).unwrap_or_default();
            let lines: Vec<_> =
                text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
            if lines.len() >= count {
                return lines;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("the command was not run");
    }

    #[tokio::test]
    async fn a_command_is_run_until_it_succeeds_once_for_each_claim() {
        let directory = tempfile::tempdir().unwrap();
        let exec = exec(directory.path());
        for _ in 0..5 {
            exec.assign(&assignment(7, 100)).unwrap();
        }
        let all = told(directory.path(), 1).await;
        let told_of = &all[0];
        assert_eq!((&told_of["version"], &told_of["action"]), (&1.into(), &"assign".into()));
        assert_eq!((&told_of["vni"], &told_of["claim"]), (&7.into(), &100.into()));
        assert_eq!(
            (&told_of["interface"], &told_of["mac"]),
            (&"lo".into(), &"02:02:02:02:02:02".into())
        );
        assert_eq!(
            (&told_of["addresses"][0], &told_of["proxy"]),
            (&"10.0.0.100".into(), &"192.0.2.101".into())
        );
        exec.assign(&assignment(7, 100)).unwrap();
        exec.assign(&assignment(8, 200)).unwrap();
        let all = told(directory.path(), 2).await;
        assert_eq!((all.len(), &all[1]["vni"]), (2, &8.into()));
    }

    #[tokio::test]
    async fn what_is_another_s_by_now_is_not_tried_again() {
        let directory = tempfile::tempdir().unwrap();
        let exec = exec(directory.path());
        exec.assign(&assignment(7, 100)).unwrap();
        let tried = directory.path().join("tried-100");
        while !tried.exists() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        exec.leave(7);
        exec.assign(&assignment(8, 200)).unwrap();
        let all = told(directory.path(), 1).await;
        assert_eq!((all.len(), &all[0]["vni"]), (1, &8.into()));
    }
}
