//! Each wall of the jail, climbed from inside: a process goes in as a microVM's does, and tries.
//!
//! The climber is this program once more, told by an environment variable which wall to try.

mod common;

use std::fs::{self, File};
use std::io;
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

use common::{Host, kvm};
use nix::errno::Errno;
use nix::fcntl::{OFlag, openat};
use nix::sys::prctl;
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::Mode;
use nix::unistd::{ForkResult, Pid, Uid, dup, fork, getgroups, getppid, getresuid, setuid};
use warren_vmm::control::GuestKind;
use warren_vmm::jail::{self, FIRST_UID, Inhabitant, Jail, JailConfig};

const SLOT: u32 = 7;
const GUEST_MEMORY: u64 = 4 << 20;
const WALL: &str = "WARREN_TEST_WALL";
const RUN_DIR: &str = "WARREN_TEST_RUN_DIR";

/// Whether there is what a jail is made of; root, that is.
fn root() -> bool {
    let root = Uid::effective().is_root();
    assert!(root || std::env::var("WARREN_REQUIRE_KVM").as_deref() != Ok("1"), "this is not root");
    root
}

/// Runs the climber against a wall; `None` where there is no jail.
fn climb(wall: &str) -> Option<Output> {
    climb_with(wall, |_| {})
}

/// The same; what `after` sees is there still: the climber's control groups, by their name.
fn climb_with(wall: &str, after: impl FnOnce(&Path)) -> Option<Output> {
    if !root() {
        return None;
    }
    let run_dir = tempfile::tempdir().unwrap();
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["the_climber", "--exact", "--nocapture", "--test-threads=1"])
        .env(WALL, wall)
        .env(RUN_DIR, run_dir.path())
        .output()
        .unwrap();
    let group = config(run_dir.path()).cgroup;
    after(&group);
    jail::remove_groups(&group);
    Some(output)
}

fn config(run_dir: &Path) -> JailConfig {
    let name = run_dir.file_name().unwrap().to_str().unwrap();
    JailConfig { cpu_percent: 20, ..JailConfig::named(&format!("test{name}")) }
}

/// The climber came back from its wall.
fn assert_held(output: Option<Output>) {
    let Some(output) = output else { return };
    let text = String::from_utf8_lossy(&output.stdout);
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}\n{text}\n{error}", output.status);
    // Lest a name that is not found pass for a wall that holds.
    assert!(text.contains("1 passed"), "{text}");
}

/// Not a test by itself: what the others run in a process of its own.
#[test]
fn the_climber() {
    let Ok(wall) = std::env::var(WALL) else { return };
    let run_dir = std::env::var(RUN_DIR).unwrap();
    let run_dir = Path::new(&run_dir);
    let outside = File::open("/etc").unwrap();
    let kvm = File::open("/dev/null").unwrap();
    openat(&outside, "passwd", OFlag::O_RDONLY, Mode::empty())
        .expect("it can be read from outside");

    let mut jail = Jail::build(&config(run_dir), GuestKind::NoOs, GUEST_MEMORY, run_dir).unwrap();
    let place = jail.prepare(SLOT, &[]).unwrap();
    let wanted = wall.strip_prefix("call ");
    if wanted.is_some() {
        jail.confine().unwrap();
    }
    let cell = jail.enter(place).unwrap();

    if let Some(call) = wanted {
        cell.close().unwrap();
        forbidden(call, &kvm);
        return;
    }
    match wall.as_str() {
        "root" => {
            // Landlock lets nothing be opened; to look up and to make needs no opening.
            assert!(fs::metadata("/").unwrap().is_dir());
            for path in ["/etc/passwd", "/proc", "/dev/kvm", "../etc", run_dir.to_str().unwrap()] {
                let error = fs::metadata(path).unwrap_err();
                assert_eq!(error.kind(), io::ErrorKind::NotFound, "{path}");
            }
            assert!(fs::create_dir("/x").is_err());
            assert!(File::create("/x").is_err());
            assert!(fs::read_dir("/").is_err());
        }
        "landlock" => {
            let opened = openat(outside.as_fd(), "passwd", OFlag::O_RDONLY, Mode::empty());
            assert_eq!(opened.unwrap_err(), Errno::EACCES);
        }
        "user" => {
            let user = Uid::from_raw(FIRST_UID + SLOT);
            let ids = getresuid().unwrap();
            assert_eq!([ids.real, ids.effective, ids.saved], [user; 3]);
            assert!(getgroups().unwrap().is_empty());
            assert_eq!(setuid(Uid::from_raw(0)).unwrap_err(), Errno::EPERM);
            assert!(prctl::get_no_new_privs().unwrap());
        }
        "signals" => {
            assert_eq!(kill(getppid(), None).unwrap_err(), Errno::EPERM);
            assert_eq!(kill(getppid(), Signal::SIGTERM).unwrap_err(), Errno::EPERM);
        }
        "network" => {
            let interfaces = nix::net::if_::if_nameindex().unwrap();
            let names: Vec<_> = interfaces.iter().map(|i| i.name().to_owned()).collect();
            assert_eq!(names, [c"lo".to_owned()]);
            // Landlock, which knows of TCP from Linux 6.7 on, stands before the missing network.
            let kind = TcpStream::connect("127.0.0.1:1").unwrap_err().kind();
            let walls = [io::ErrorKind::PermissionDenied, io::ErrorKind::NetworkUnreachable];
            assert!(walls.contains(&kind), "{kind:?}");
            let error = std::net::UdpSocket::bind("127.0.0.1:0")
                .and_then(|socket| socket.send_to(b"x", "127.0.0.1:9"))
                .unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::ENETUNREACH));
        }
        "processes" => {
            // SAFETY: the child does nothing but end.
            match unsafe { fork() } {
                Ok(ForkResult::Child) => std::process::exit(0),
                forked => assert_eq!(forked.unwrap_err(), Errno::EAGAIN),
            }
        }
        "descriptors" => {
            let mut kept = Vec::new();
            let error = loop {
                match dup(&outside) {
                    Ok(copy) => kept.push(copy),
                    Err(errno) => break errno,
                }
            };
            assert_eq!(error, Errno::EMFILE);
            assert!(kept.len() < 1024);
        }
        "address space" => {
            let vast = Vec::<u8>::new().try_reserve_exact(1 << 30);
            assert!(vast.is_err());
        }
        "memory" => {
            let mut all = Vec::new();
            for _ in 0..48 {
                all.push(vec![1u8; 1 << 20]);
            }
            println!("{} MiB in use", all.len());
        }
        "processor" => {
            let mut random = 1u64;
            for _ in 0..400_000_000u64 {
                random = std::hint::black_box(random.wrapping_mul(6_364_136_223_846_793_005));
            }
        }
        other => panic!("there is no wall {other:?}"),
    }
}

#[test]
fn no_file_is_there() {
    assert_held(climb("root"));
}

#[test]
fn a_directory_from_outside_leads_nowhere() {
    assert_held(climb("landlock"));
}

#[test]
fn it_is_nobody_and_stays_so() {
    assert_held(climb("user"));
}

#[test]
fn it_signals_nobody() {
    assert_held(climb("signals"));
}

#[test]
fn it_has_no_network() {
    assert_held(climb("network"));
}

#[test]
fn it_has_no_children() {
    assert_held(climb("processes"));
}

#[test]
fn its_descriptors_are_counted() {
    assert_held(climb("descriptors"));
}

#[test]
fn its_address_space_ends() {
    assert_held(climb("address space"));
}

#[test]
fn memory_beyond_its_share_is_its_end() {
    let Some(output) = climb("memory") else { return };
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.signal(), Some(libc::SIGKILL), "{text}");
}

#[test]
fn a_busy_one_is_held_back() {
    let mut throttled = 0;
    let output = climb_with("processor", |group| {
        for hierarchy in ["/sys/fs/cgroup/cpu", "/sys/fs/cgroup"] {
            let file = Path::new(hierarchy).join(group).join(format!("vm-{SLOT}/cpu.stat"));
            let text = fs::read_to_string(file).unwrap_or_default();
            let count = text.lines().find_map(|line| line.strip_prefix("nr_throttled "));
            throttled += count.map_or(0, |count| count.parse::<u64>().unwrap());
        }
    });
    let Some(_) = &output else { return };
    assert_held(output);
    assert!(throttled > 0);
}

/// System calls that lead out of a jail, or to parts of the kernel that a microVM has no use for.
fn forbidden(call: &str, file: &File) {
    use std::os::fd::AsRawFd;
    let fd = file.as_raw_fd();
    let path = c"/".as_ptr();
    let null = std::ptr::null::<u8>();
    // SAFETY: whatever they would do, the process ends before.
    unsafe {
        match call {
            "openat" => libc::syscall(libc::SYS_openat, libc::AT_FDCWD, path, 0),
            "execve" => libc::syscall(libc::SYS_execve, path, null, null),
            "fork" => libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0),
            "clone3" => libc::syscall(libc::SYS_clone3, null, 0),
            "socket" => libc::syscall(libc::SYS_socket, libc::AF_INET, libc::SOCK_STREAM, 0),
            "connect" => libc::syscall(libc::SYS_connect, fd, null, 0),
            "bind" => libc::syscall(libc::SYS_bind, fd, null, 0),
            "sendmsg" => libc::syscall(libc::SYS_sendmsg, fd, null, 0),
            "ptrace" => libc::syscall(libc::SYS_ptrace, libc::PTRACE_TRACEME, 0, 0, 0),
            "process_vm_readv" => libc::syscall(libc::SYS_process_vm_readv, 1, null, 0, null, 0, 0),
            "kill" => libc::syscall(libc::SYS_kill, 1, 0),
            "unshare" => libc::syscall(libc::SYS_unshare, libc::CLONE_NEWUSER),
            "setns" => libc::syscall(libc::SYS_setns, fd, 0),
            "mount" => libc::syscall(libc::SYS_mount, path, path, null, 0, null),
            "chroot" => libc::syscall(libc::SYS_chroot, path),
            "setuid" => libc::syscall(libc::SYS_setuid, 0),
            "prctl" => libc::syscall(libc::SYS_prctl, libc::PR_GET_DUMPABLE, 0, 0, 0, 0),
            "bpf" => libc::syscall(libc::SYS_bpf, 0, null, 0),
            "io_uring_setup" => libc::syscall(libc::SYS_io_uring_setup, 1, null),
            "userfaultfd" => libc::syscall(libc::SYS_userfaultfd, 0),
            "memfd_create" => libc::syscall(libc::SYS_memfd_create, path, 0),
            "perf_event_open" => libc::syscall(libc::SYS_perf_event_open, null, 0, 0, -1, 0),
            "keyctl" => libc::syscall(libc::SYS_keyctl, 0, 0),
            "setrlimit" => libc::syscall(libc::SYS_setrlimit, libc::RLIMIT_AS, null),
            "ioctl of a terminal" => libc::syscall(libc::SYS_ioctl, fd, libc::TIOCSTI, null),
            "executable memory" => libc::syscall(
                libc::SYS_mmap,
                0,
                4096,
                libc::PROT_READ | libc::PROT_EXEC,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            ),
            "memory made executable" => libc::syscall(
                libc::SYS_mprotect,
                std::ptr::from_ref(&forbidden) as usize & !4095,
                4096,
                libc::PROT_READ | libc::PROT_EXEC,
            ),
            other => panic!("there is no call {other:?}"),
        };
    }
}

#[test]
fn a_system_call_that_is_not_listed_is_its_end() {
    let calls = [
        "openat",
        "execve",
        "fork",
        "clone3",
        "socket",
        "connect",
        "bind",
        "sendmsg",
        "ptrace",
        "process_vm_readv",
        "kill",
        "unshare",
        "setns",
        "mount",
        "chroot",
        "setuid",
        "prctl",
        "bpf",
        "io_uring_setup",
        "userfaultfd",
        "memfd_create",
        "perf_event_open",
        "keyctl",
        "setrlimit",
        "ioctl of a terminal",
        "executable memory",
        "memory made executable",
    ];
    for call in calls {
        let Some(output) = climb(&format!("call {call}")) else { return };
        let text = String::from_utf8_lossy(&output.stdout);
        assert_eq!(output.status.signal(), Some(libc::SIGSYS), "{call}: {text}");
    }
}

/// A microVM's own process, seen from outside: it is in there.
#[tokio::test]
async fn a_microvm_is_within_all_walls() {
    if !kvm() {
        return;
    }
    let host = Host::new("warren-guest").await;
    let mut microvm = host.running(SLOT).await;
    let proc = Path::new("/proc").join(microvm.pid().to_string());
    let status = fs::read_to_string(proc.join("status")).unwrap();
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(&format!("{name}:")));
        line.unwrap().split_whitespace().map(str::to_owned).collect::<Vec<_>>()
    };
    let user = (FIRST_UID + SLOT).to_string();
    assert_eq!(field("Uid"), vec![user.clone(); 4]);
    assert_eq!(field("Gid"), vec![user; 4]);
    assert!(field("Groups").is_empty());
    for capabilities in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
        assert_eq!(field(capabilities), ["0000000000000000"], "{capabilities}");
    }
    assert_eq!(field("NoNewPrivs"), ["1"]);
    assert_eq!(field("Seccomp"), ["2"]);
    // Its own thread, and the one that KVM may make in its name.
    assert!(fs::read_dir(proc.join("task")).unwrap().count() <= 2);
    assert_eq!(fs::read_dir(proc.join("root")).unwrap().count(), 0);
    for namespace in ["mnt", "net", "ipc", "uts"] {
        let of = |proc: &Path| fs::read_link(proc.join("ns").join(namespace)).unwrap();
        assert_ne!(of(&proc), of(Path::new("/proc/self")), "{namespace}");
    }
    let group = host.jail.cgroup.join(format!("vm-{SLOT}"));
    let groups = fs::read_to_string(proc.join("cgroup")).unwrap();
    let inside = groups.lines().filter(|line| line.ends_with(group.to_str().unwrap())).count();
    // One hierarchy in version 2, one for each controller in version 1.
    assert!(matches!(inside, 1 | 3), "{groups}");

    let mut descriptors: Vec<_> = fs::read_dir(proc.join("fd"))
        .unwrap()
        .flatten()
        .filter(|entry| entry.file_name().to_str().unwrap().parse::<u32>().unwrap() > 2)
        .map(|entry| fs::read_link(entry.path()).unwrap().to_str().unwrap().to_owned())
        .map(|target| target.split(":[").next().unwrap().to_owned())
        .collect();
    descriptors.sort();
    // Its socket and this connection to it; its TAP; its machine.
    let expected =
        ["/dev/net/tun", "anon_inode:kvm-vcpu:0", "anon_inode:kvm-vm", "socket", "socket"];
    assert_eq!(descriptors, expected);
    microvm.stop().await.unwrap();
}

/// Whoever lost its socket is found nevertheless, and nobody else is.
#[tokio::test]
async fn inhabitants_are_found_without_their_sockets() {
    if !kvm() {
        return;
    }
    let (host, other) = (Host::new("warren-guest").await, Host::new("warren-guest").await);
    let mut bystander = other.parked(SLOT).await;
    let mut microvms = [host.running(SLOT).await, host.parked(SLOT + 1).await];
    for microvm in &microvms {
        fs::remove_file(microvm.path()).unwrap();
    }
    let expected = microvms.each_ref().map(|microvm| {
        let (slot, pid) = (microvm.slot(), Pid::from_raw(microvm.pid()));
        Inhabitant { slot, pid }
    });
    for mut found in [jail::inhabitants(&host.jail), jail::by_user(&host.jail)] {
        found.sort_by_key(|inhabitant| inhabitant.slot);
        assert_eq!(found, expected);
    }
    for microvm in &mut microvms {
        microvm.stop().await.unwrap();
    }
    bystander.stop().await.unwrap();
    // A process is in its group for a moment after its slot is free.
    for _ in 0..500 {
        if jail::inhabitants(&host.jail).is_empty() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("{:?}", jail::inhabitants(&host.jail));
}
