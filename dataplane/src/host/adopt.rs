//! Takes over the microVMs that an earlier daemon left, and ends those that are nobody's.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::timeout;
use warren_vmm::client::{ClientError, MicroVm};
use warren_vmm::control::{State, Status};

use super::{Host, HostError, Record, sockets};
use crate::pool::Pool;
use crate::recovery::{Fate, Found, fate};

/// How long a microVM may take to say what it is of.
const PATIENCE: Duration = Duration::from_secs(5);

impl Host {
    /// Finds what an earlier daemon left. Afterwards each slot is free, or a microVM that this
    /// daemon knows is on it.
    pub(super) async fn recover(self: &Arc<Self>) -> Result<(), HostError> {
        let (mut known, mut taken) = (HashSet::new(), HashSet::new());
        for (mut microvm, status) in sockets::discover(&self.options.run_dir).await? {
            let number = microvm.slot();
            // Those that are ended here, too: that takes them a moment.
            known.insert((number, microvm.pid()));
            let record = self.record(&status);
            let found = Found {
                has_slot: self.datapath.slots().iter().any(|slot| slot.number == number),
                state: status.state,
                pool: self.pool_of(&mut microvm, &status).await,
                is_connected: record.as_ref().is_some_and(|r| self.vni_of(number) == Some(r.vni)),
                record,
            };
            match fate(found) {
                Fate::Pool(pool, tier) => {
                    // It is connected if the daemon was killed in the middle of a start.
                    self.datapath.detach(number)?;
                    pool.keep(microvm, tier);
                }
                Fate::Serve(record) => {
                    tracing::info!(id = %record.id, slot = number, "instance found again");
                    self.enlist(record, self.slot(number), microvm);
                }
                Fate::End(orphan) => {
                    self.slots.end_orphan(microvm, orphan).await;
                    continue;
                }
            }
            taken.insert(number);
        }
        self.slots.reap(|slot, pid| known.contains(&(slot, pid))).await;
        for slot in self.datapath.slots() {
            if !taken.contains(&slot.number) {
                self.slots.free(slot.number);
            }
        }
        Ok(())
    }

    /// Who a microVM is, if it is somebody.
    fn record(&self, status: &Status) -> Option<Record> {
        let mut record: Record = serde_json::from_slice(&status.tag).ok()?;
        record.template = self.pools.named(record.template);
        Some(record)
    }

    /// The pool whose zygote makes what a microVM is; not asked of one that runs.
    async fn pool_of(&self, microvm: &mut MicroVm, status: &Status) -> Option<&Pool> {
        if status.state == State::Running {
            return None;
        }
        let make = timeout(PATIENCE, microvm.make()).await;
        let make = make.unwrap_or(Err(ClientError::Timeout(PATIENCE)));
        self.pools.of(make.ok()?).await
    }

    /// The VPC that a slot is connected to.
    fn vni_of(&self, slot: u32) -> Option<u32> {
        Some(self.datapath.attachment(slot).ok()??.vni)
    }
}
