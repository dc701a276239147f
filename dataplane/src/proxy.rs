//! A proxy node: the data path, and who is told of its addresses.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::task::AbortHandle;

use crate::datapath::{DropCount, Error, ProxyDatapath, ProxyVpc};

/// When addresses are announced again, after the first time at once: an announcement may be lost.
const AGAIN: [Duration; 3] =
    [Duration::from_millis(100), Duration::from_secs(1), Duration::from_secs(3)];

/// A proxy node.
pub struct Proxy {
    datapath: Arc<ProxyDatapath>,
    /// Announcements under way, by VNI.
    announcing: Mutex<HashMap<u32, AbortHandle>>,
}

impl Proxy {
    /// A proxy over an open data path.
    pub fn new(datapath: ProxyDatapath) -> Self {
        Self { datapath: Arc::new(datapath), announcing: Mutex::default() }
    }

    /// Makes a VPC known, or replaces what was known of it. Addresses that are this proxy's from now
    /// on are announced. To be called from a runtime's thread.
    pub fn apply_vpc(&self, vpc: &ProxyVpc) -> Result<(), Error> {
        let before = self.datapath.announcement(vpc.vni)?;
        self.datapath.apply_vpc(vpc)?;
        if before != self.datapath.announcement(vpc.vni)? {
            self.announce(vpc.vni);
        }
        Ok(())
    }

    /// Forgets a VPC.
    pub fn remove_vpc(&self, vni: u32) -> Result<(), Error> {
        self.datapath.remove_vpc(vni)
    }

    /// What was dropped, per VNI and reason.
    pub fn drops(&self) -> Result<Vec<DropCount>, Error> {
        self.datapath.drops()
    }

    /// Announces the VPC's addresses several times, as long as they are this proxy's.
    fn announce(&self, vni: u32) {
        announce_once(&self.datapath, vni);
        let datapath = self.datapath.clone();
        let task = tokio::spawn(async move {
            for pause in AGAIN {
                tokio::time::sleep(pause).await;
                announce_once(&datapath, vni);
            }
        });
        let mut announcing = self.announcing.lock().unwrap_or_else(PoisonError::into_inner);
        announcing.retain(|_, task| !task.is_finished());
        if let Some(before) = announcing.insert(vni, task.abort_handle()) {
            before.abort();
        }
    }
}

fn announce_once(datapath: &ProxyDatapath, vni: u32) {
    let sent = match datapath.announcement(vni) {
        Ok(Some(announcement)) => announcement.send().map_err(|error| error.to_string()),
        Ok(None) => Ok(()),
        Err(error) => Err(error.to_string()),
    };
    if let Err(reason) = sent {
        tracing::error!(vni, reason, "a VPC is not told that its shared address moved here");
    }
}
