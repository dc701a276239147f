//! Link-local services, over a host's data path, to guests with a kernel's stack.

mod dns;
mod metadata;
mod scan;

use std::collections::HashMap;
use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use tokio::sync::oneshot;
use warren_dataplane::boot::BootId;
use warren_dataplane::datapath::Attachment;
use warren_dataplane::services::{Directory, Instance, Naming, Options, Services, Vpc};
use warren_netns::topology::SERVER;

use crate::bed::{Bed, VNI_A, VNI_B};

pub const METADATA: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);
pub const DNS: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 253);

/// What a host would know.
#[derive(Default)]
struct Known {
    attachments: Mutex<HashMap<u32, Attachment>>,
    vpcs: Mutex<HashMap<u32, Vpc>>,
}

impl Directory for Known {
    fn attachment(&self, slot: u32) -> Option<Attachment> {
        self.attachments.lock().expect("nobody panicked").get(&slot).copied()
    }

    fn instance(&self, slot: u32) -> Option<Instance> {
        let Attachment { vni, generation } = self.attachment(slot)?;
        Some(Instance {
            instance_id: format!("instance-{generation}"),
            hostname: format!("vm-{slot}"),
            vni,
            ..Instance::default()
        })
    }

    fn vpc(&self, vni: u32) -> Option<Vpc> {
        self.vpcs.lock().expect("nobody panicked").get(&vni).cloned()
    }
}

/// A bed whose host serves.
struct Served {
    serving: Option<Serving>,
    known: Arc<Known>,
    bed: Bed,
}

/// A daemon's part that serves.
struct Serving {
    stop: oneshot::Sender<()>,
    thread: JoinHandle<()>,
}

impl Served {
    fn new() -> Self {
        let mut served = Self { serving: None, known: Arc::default(), bed: Bed::new() };
        for vni in [VNI_A, VNI_B] {
            served.name(vni, Some(SERVER), Some("corp.internal"));
        }
        served.start();
        served
    }

    /// Sets how names are resolved in a VPC.
    fn name(&self, vni: u32, resolver: Option<Ipv4Addr>, search_domain: Option<&str>) {
        let search_domain = Naming::parse_domain(search_domain.unwrap_or_default());
        let search_domain = search_domain.expect("it is a name");
        let vpc = Vpc { naming: Naming { resolver, search_domain } };
        self.known.vpcs.lock().expect("nobody panicked").insert(vni, vpc);
    }

    fn attach(&self, slot: u32, vni: u32) {
        let generation = self.bed.host().attach(slot, vni).expect("the slot is free");
        let attachment = Attachment { vni, generation };
        self.known.attachments.lock().expect("nobody panicked").insert(slot, attachment);
    }

    fn detach(&self, slot: u32) {
        self.known.attachments.lock().expect("nobody panicked").remove(&slot);
        self.bed.host().detach(slot).expect("the slot can be detached");
    }

    fn start(&mut self) {
        let options = Options {
            device: self.bed.host().services_device().to_owned(),
            mtu: self.bed.host().mtu(),
            run_dir: self.bed.run.path().to_owned(),
            host: "h1".to_owned(),
            boot: BootId::of("a boot"),
        };
        let (known, (stop, stopped)) = (self.known.clone(), oneshot::channel());
        let (ready, is_ready) = std::sync::mpsc::channel();
        let thread = self.bed.topology.host.spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.expect("a runtime can be made").block_on(async {
                let services = Services::open(&options, known).expect("services open");
                ready.send(()).expect("the test waits");
                tokio::select! { () = services.run() => {}, _ = stopped => {} }
            });
        });
        is_ready.recv().expect("services open");
        self.serving = Some(Serving { stop, thread });
        // As after `open_tap`: the device sends when the link watch ran.
        let device = self.bed.host().services_device();
        self.bed.topology.host.ip(&format!("link show {device}")).expect("it is there");
    }

    /// Leaves everything as a process that is killed.
    fn stop(&mut self) {
        if let Some(Serving { stop, thread }) = self.serving.take() {
            stop.send(()).ok();
            thread.join().expect("services do not panic");
        }
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.stop();
    }
}
