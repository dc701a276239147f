//! Each wall around the compiler, climbed from inside.
//!
//! The climber is this program once more, told by an environment variable which wall to try.

use std::fs::{self, File};
use std::hint::black_box;
use std::io::{self, Write};
use std::net::{TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::prctl;
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use nix::unistd::{ForkResult, Pid, Uid, execv, fork, getgroups, getppid, getresuid};
use warren_function::jail;
use warren_function::jailed::Limits;

const WALL: &str = "WARREN_TEST_WALL";

/// The exit code of one that did what is forbidden.
const CAME_BACK: i32 = 3;

const LIMITS: Limits = Limits { memory_bytes: 512 << 20, cpu_time: Duration::from_secs(1) };

fn climb(wall: &str) -> Output {
    Command::new(std::env::current_exe().unwrap())
        .args(["the_climber", "--exact", "--nocapture", "--test-threads=1"])
        .env(WALL, wall)
        .output()
        .unwrap()
}

/// The climber came back from its wall.
fn assert_held(wall: &str) {
    let output = climb(wall);
    let text = String::from_utf8_lossy(&output.stdout);
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{wall}: {}\n{text}\n{error}", output.status);
    // Lest a name that is not found pass for a wall that holds.
    assert!(text.contains("1 passed"), "{wall}: {text}");
}

/// The climber did not come back.
fn assert_ended(wall: &str, signal: Signal) {
    let output = climb(wall);
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.signal(), Some(signal as i32), "{wall}: {}\n{error}", output.status);
}

/// Not a test by itself: what the others run in a process of its own.
#[test]
fn the_climber() {
    let Ok(wall) = std::env::var(WALL) else { return };
    fs::read("/etc/passwd").expect("it can be read from outside");
    let left_open = File::open("/etc/passwd").unwrap();
    let is_root = Uid::effective().is_root();

    let cell = jail::enter(LIMITS).unwrap();
    match wall.as_str() {
        "files" => {
            for path in ["/etc/passwd", "/", "/proc/self/mem", "/dev/null"] {
                let kind = File::open(path).unwrap_err().kind();
                assert_eq!(kind, io::ErrorKind::PermissionDenied, "{path}");
            }
            assert!(File::create("/tmp/warren-climbed").is_err());
            assert!(fs::create_dir("/tmp/warren-climbed").is_err());
        }
        "descriptors" => {
            let gone = fcntl(&left_open, FcntlArg::F_GETFD).unwrap_err();
            assert_eq!(gone, Errno::EBADF, "{}", left_open.as_raw_fd());
            // To close it once more would be the library's end.
            std::mem::forget(left_open);
        }
        "network" => {
            assert!(TcpStream::connect("127.0.0.1:1").is_err());
            if is_root {
                let socket = UdpSocket::bind("127.0.0.1:0");
                let error = socket.and_then(|socket| socket.send_to(b"x", "127.0.0.1:9"));
                assert_eq!(error.unwrap_err().raw_os_error(), Some(libc::ENETUNREACH));
            }
        }
        "user" => {
            assert!(prctl::get_no_new_privs().unwrap());
            if is_root {
                let ids = getresuid().unwrap();
                assert_eq!([ids.real, ids.effective, ids.saved], [Uid::from_raw(65534); 3]);
                assert!(getgroups().unwrap().is_empty());
                assert_eq!(kill(getppid(), None).unwrap_err(), Errno::EPERM);
            }
        }
        "memory" => {
            let mut much = Vec::<u8>::new();
            assert!(much.try_reserve(LIMITS.memory_bytes as usize).is_err());
            much.try_reserve(LIMITS.memory_bytes as usize / 8).unwrap();
        }
        "threads" => {
            cell.close().unwrap();
            let sum: u32 = (0..8)
                .map(|n| std::thread::spawn(move || black_box(n)))
                .map(|thread| thread.join().unwrap())
                .sum();
            assert_eq!(sum, 28);
        }
        "absent" => {
            cell.close().unwrap();
            let error = File::open("/etc/passwd").unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::ENOSYS));
        }
        other => {
            cell.close().unwrap();
            forbidden(other);
            // It came back. To panic would be its end for other reasons.
            std::process::exit(CAME_BACK);
        }
    }
}

/// Maps a page.
fn map(protection: libc::c_int, then: impl Fn(*mut libc::c_void)) {
    let kind = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: the kernel chooses where, and nobody relies on it.
    then(unsafe { libc::mmap(std::ptr::null_mut(), 4096, protection, kind, -1, 0) });
}

/// Tries what is the process's end.
fn forbidden(call: &str) {
    match call {
        "socket" => drop(socket(AddressFamily::Inet, SockType::Stream, SockFlag::empty(), None)),
        "program" => {
            let _ = execv(c"/bin/true", &[c"true"]);
        }
        // Not to its parent, whose number would be asked for first.
        "kill" => drop(kill(Pid::from_raw(1), None)),
        "directory" => drop(fs::create_dir("/tmp/warren-climbed")),
        "abort" => std::process::abort(),
        "processor" => loop {
            black_box(0);
        },
        "fork" => {
            // SAFETY: the child does nothing but end.
            if let Ok(ForkResult::Child) = unsafe { fork() } {
                std::process::abort();
            }
        }
        "code" => map(libc::PROT_READ | libc::PROT_EXEC, |_| {}),
        "code of data" => map(libc::PROT_READ, |page| {
            // SAFETY: nothing else has the page.
            unsafe { libc::mprotect(page, 4096, libc::PROT_READ | libc::PROT_EXEC) };
        }),
        call => unreachable!("{call}"),
    }
}

#[test]
fn walls_hold_without_the_filter() {
    for wall in ["files", "descriptors", "network", "user", "memory"] {
        assert_held(wall);
    }
}

#[test]
fn what_a_compiler_needs_it_has() {
    for wall in ["threads", "absent"] {
        assert_held(wall);
    }
    // To abort, it must be able to send itself a signal.
    assert_ended("abort", Signal::SIGABRT);
}

#[test]
fn forbidden_calls_are_the_end() {
    for call in ["socket", "program", "kill", "directory", "fork", "code", "code of data"] {
        assert_ended(call, Signal::SIGSYS);
    }
}

#[test]
fn the_processors_time_is_limited() {
    let began = Instant::now();
    assert_ended("processor", Signal::SIGXCPU);
    assert!(began.elapsed() < Duration::from_secs(30));
}

/// The compiler itself, which waits for its component.
struct Waiting(Child);

impl Drop for Waiting {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn the_compiler_is_within_all_walls_before_it_reads() {
    let child = Command::new(env!("CARGO_BIN_EXE_warren-compile"))
        .args(["--memory-bytes", "1073741824", "--cpu-seconds", "10"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut waiting = Waiting(child);
    let proc = format!("/proc/{}", waiting.0.id());
    let said = |file: &str| fs::read_to_string(format!("{proc}/{file}")).unwrap();
    let deadline = Instant::now() + Duration::from_secs(10);
    while !said("status").lines().any(|line| line == "Seccomp_filters:\t2") {
        assert!(Instant::now() < deadline, "{}", said("status"));
        std::thread::sleep(Duration::from_millis(5));
    }
    let status = said("status");
    assert!(status.contains("NoNewPrivs:\t1\n") && status.contains("Threads:\t1\n"), "{status}");
    assert!(said("limits").contains("Max address space         1073741824"));
    if Uid::effective().is_root() {
        assert!(status.contains("Uid:\t65534\t65534\t65534\t65534\n"), "{status}");
        assert!(status.contains("CapEff:\t0000000000000000\n"), "{status}");
        let network = |of: &str| fs::read_link(format!("{of}/ns/net")).unwrap();
        assert_ne!(network(&proc), network("/proc/self"));
    }
    // And there it answers.
    waiting.0.stdin.take().unwrap().write_all(b"garbage").unwrap();
    assert!(waiting.0.wait().unwrap().success());
}
