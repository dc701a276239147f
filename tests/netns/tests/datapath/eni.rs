//! Addresses that a cloud's API moves: its network looks at nobody's ARP.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use serde_json::Value;
use warren_netns::cluster::{Cluster, VNIS};
use warren_netns::netns::Namespace;
use warren_netns::servers::udp_echo;
use warren_netns::topology::{SERVER, SHARED, VPC_INTERFACES};

use crate::bed::eventually;
use crate::traffic::udp_round_trip;

const PORT: u16 = 7000;

/// A cloud: what is put into its inbox is where it sends packets.
struct Cloud {
    inbox: PathBuf,
    done: BTreeSet<PathBuf>,
}

impl Cloud {
    /// With the command by which proxies tell it.
    fn new(dir: &Path) -> (Self, String) {
        let inbox = dir.join("inbox");
        fs::create_dir(&inbox).expect("it can be made");
        let command = dir.join("assign-addresses");
        let script =
            "#!/bin/sh\nset -e\ncat > \"$1/$$.new\"\nmv \"$1/$$.new\" \"$1/$(date +%s%N)\"\n";
        fs::write(&command, script).expect("it can be written");
        fs::set_permissions(&command, fs::Permissions::from_mode(0o755)).expect("it can be run");
        let config =
            format!("[proxy]\nassign_command = ['{}', '{}']\n", command.display(), inbox.display());
        (Self { inbox, done: BTreeSet::new() }, config)
    }

    /// Does what it was told of a VNI since it last looked.
    fn turn(&mut self, vni: u32, network: &Namespace) -> Vec<Value> {
        let found = fs::read_dir(&self.inbox).expect("it can be read");
        let is_whole = |path: &PathBuf| path.extension().is_none();
        let new: BTreeSet<_> = found
            .map(|entry| entry.expect("it can be read").path())
            .filter(|path| is_whole(path) && !self.done.contains(path))
            .collect();
        let mut told = Vec::new();
        for path in new {
            let text = fs::read(&path).expect("it can be read");
            let order: Value = serde_json::from_slice(&text).expect("it is JSON");
            self.done.insert(path);
            if order["vni"] == vni {
                let mac = order["mac"].as_str().expect("it is text");
                let words = format!("neigh replace {SHARED} lladdr {mac} dev eth0 nud permanent");
                network.ip(&words).expect("it is a neighbour");
                told.push(order);
            }
        }
        told
    }
}

#[test]
fn where_arp_moves_nothing_the_command_does() {
    let dir = tempfile::tempdir().expect("there is room");
    let (mut cloud, config) = Cloud::new(dir.path());
    let cluster = Cluster::configured(1, 2, config).expect("it starts");
    let network = &cluster.grid.vpcs[0];
    let _echo = udp_echo(network, PORT).expect("the server starts");
    // What is permanent, no announcement changes.
    let nobody = format!("neigh replace {SHARED} lladdr 02:00:00:00:00:01 dev eth0 nud permanent");
    network.ip(&nobody).expect("it is a neighbour");
    let guest = cluster.guest(0, 1, VNIS[0]).expect("the slot is free");
    let reaches = || udp_round_trip(&guest.namespace, (SERVER, PORT));
    assert!(!reaches(), "the cloud was asked for nothing yet");
    let mut told = cloud.turn(VNIS[0], network);
    eventually(|| {
        told.extend(cloud.turn(VNIS[0], network));
        reaches()
    });
    cluster.grid.cut(&cluster.grid.proxies[0].cables).expect("they can be cut");
    eventually(|| {
        told.extend(cloud.turn(VNIS[0], network));
        reaches()
    });
    let [first, .., last] = told.as_slice() else { panic!("{told:?}") };
    for (order, proxy) in [(first, 0), (last, 1)] {
        assert_eq!((&order["version"], &order["action"]), (&1.into(), &"assign".into()));
        assert_eq!(order["interface"], VPC_INTERFACES[0]);
        assert_eq!(order["addresses"], serde_json::json!([SHARED]));
        assert_eq!(order["proxy"], cluster.grid.proxies[proxy].address.to_string());
    }
    assert!(first["claim"].as_u64() < last["claim"].as_u64(), "{told:?}");
}
