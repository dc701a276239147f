//! HTTP from the VMM's vsock to the function's server: bytes, as they are.

use std::io::{self, BufReader, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpStream};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, VsockAddr, accept4, bind, listen as listen_on,
    socket,
};
use warren_abi::microvm::{HTTP_PORT, HTTP_VSOCK_PORT};

use crate::error::{AgentError, system};

/// How long a connection waits for a server that is still starting.
const PATIENCE: Duration = Duration::from_secs(30);

/// How often it tries.
const PAUSE: Duration = Duration::from_millis(2);

/// How much is copied at a time, in bytes: what a vsock packet carries at most.
const BUFFER: usize = 64 * 1024;

/// Listens on vsock.
///
/// # Errors
/// There is no vsock, or the kernel refuses.
pub fn listen() -> Result<OwnedFd, AgentError> {
    let cannot = || format!("vsock port {HTTP_VSOCK_PORT}");
    let listener = socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)
        .map_err(system(cannot()))?;
    let address = VsockAddr::new(libc::VMADDR_CID_ANY, HTTP_VSOCK_PORT);
    bind(listener.as_raw_fd(), &address).map_err(system(cannot()))?;
    listen_on(&listener, Backlog::MAXCONN).map_err(system(cannot()))?;
    Ok(listener)
}

/// Serves connections from now on, each in threads of its own.
///
/// # Errors
/// There can be no more threads.
pub fn start(listener: OwnedFd) -> Result<(), AgentError> {
    let serve = move || {
        loop {
            match accept4(listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC) {
                Ok(peer) => {
                    // SAFETY: the kernel has just made it, and nothing else knows it.
                    let peer = unsafe { OwnedFd::from_raw_fd(peer) };
                    // Without a thread it is closed, and the VMM's side knows.
                    let _ = spawn("connection", move || connect(peer, HTTP_PORT));
                }
                // Of the connection, or of a moment without memory.
                Err(Errno::EINTR | Errno::ECONNABORTED) => {}
                Err(_) => thread::sleep(PAUSE),
            }
        }
    };
    spawn("vsock", serve).map_err(system("thread"))
}

fn spawn(name: &str, run: impl FnOnce() + Send + 'static) -> io::Result<()> {
    thread::Builder::new().name(name.to_owned()).spawn(run).map(drop)
}

/// Connects a peer with the server on a port of the loopback, and returns when both have said all.
/// Without a server it is closed.
pub fn connect(peer: OwnedFd, port: u16) {
    // To the standard library every stream socket is the same; it has no type for vsock.
    let peer = UnixStream::from(peer);
    let Ok(server) = reach(port) else { return };
    // Answers are for someone who waits.
    let _ = server.set_nodelay(true);
    thread::scope(|scope| {
        let answer = || forward(&server, &peer, || peer.shutdown(Shutdown::Write));
        // Without a second thread both are closed.
        if thread::Builder::new().spawn_scoped(scope, answer).is_ok() {
            forward(&peer, &server, || server.shutdown(Shutdown::Write));
        }
    });
}

/// Copies until the end, and passes that on.
fn forward(from: impl Read, mut to: impl Write, end: impl Fn() -> io::Result<()>) {
    // What cannot be copied ends as well: there is nobody to tell.
    let _ = io::copy(&mut BufReader::with_capacity(BUFFER, from), &mut to);
    let _ = end();
}

fn reach(port: u16) -> io::Result<TcpStream> {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let deadline = Instant::now() + PATIENCE;
    loop {
        match TcpStream::connect(address) {
            Err(error)
                if error.kind() == io::ErrorKind::ConnectionRefused
                    && Instant::now() < deadline =>
            {
                thread::sleep(PAUSE);
            }
            result => return result,
        }
    }
}
