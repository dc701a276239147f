//! An identity is applied to a namespace as to a guest.

mod common;

use std::fs::{self, File};
use std::io::Read;
use std::process::Command;

use common::{apart, identity};
use nix::unistd::gethostname;
use warren_agent::identity::{seed, set_names};
use warren_agent::network::{self, Link};

fn ip(arguments: &str) -> String {
    let output = Command::new("ip").args(arguments.split(' ')).output().unwrap();
    assert!(output.status.success(), "ip {arguments}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// An interface that is down, as the guest's before the release.
fn interface() -> Link {
    ip("link add eth0 type veth peer name other");
    ip("link set other up");
    Link::open("eth0").unwrap()
}

#[test]
fn the_interface_becomes_the_clones() {
    apart(|| {
        network::up("lo").unwrap();
        assert!(ip("link show lo").contains("LOOPBACK,UP"));

        let link = interface();
        let before = ip("-o link show eth0");
        link.rehearse().unwrap();
        assert_eq!(ip("-o link show eth0"), before);

        link.apply(&identity()).unwrap();
        let after = ip("-o link show eth0");
        for part in [",UP", " mtu 1400 ", " link/ether 02:11:22:33:44:55 "] {
            assert!(after.contains(part), "no {part} in {after}");
        }
        let address = ip("-o -4 address show eth0");
        assert_eq!(address.lines().count(), 1, "{address}");
        assert!(address.contains(" inet 10.1.0.7/32 scope global "), "{address}");
        let routes = ip("-4 route show");
        let routes: Vec<_> = routes.lines().map(str::trim_end).collect();
        let expected = [
            "default via 169.254.1.1 dev eth0 proto static",
            "169.254.1.1 dev eth0 proto static scope link",
        ];
        assert_eq!(routes, expected);
        // No address is one of a broadcast.
        let local = ip("-4 route show table local dev eth0");
        assert_eq!(local.trim_end(), "local 10.1.0.7 proto kernel scope host src 10.1.0.7");
    });
}

#[test]
fn what_the_kernel_refuses_is_named() {
    apart(|| {
        let error = Link::open("eth0").err().unwrap().to_string();
        assert!(error.starts_with("interface eth0: "), "{error}");

        let link = interface();
        let mut identity = identity();
        identity.mtu = 10;
        let error = link.apply(&identity).unwrap_err().to_string();
        assert!(error.starts_with("MAC address, MTU or state of eth0: "), "{error}");
    });
}

#[test]
fn the_machine_gets_its_names() {
    apart(|| {
        let folder = tempfile::tempdir().unwrap();
        let etc = folder.path().join("etc");
        set_names(&identity(), &etc).unwrap();
        assert_eq!(gethostname().unwrap(), "clone-7");
        let machine_id = fs::read_to_string(etc.join("machine-id")).unwrap();
        assert_eq!(machine_id, "0123456789ab4def8123456789abcdef\n");
    });
}

#[test]
fn the_random_generator_takes_the_entropy() {
    let mut identity = identity();
    // It goes into this machine's own generator: nothing that others could know.
    File::open("/dev/urandom").unwrap().read_exact(&mut identity.entropy).unwrap();
    seed(&identity).unwrap();
}
