//! The relay by itself, with raw bytes.

use std::net::SocketAddr;
use std::path::Path;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UnixListener};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use warren_gateway::metrics::RelayCounts;
use warren_gateway::relay;

const ID: &str = "67e55044-10b1-426f-9247-bb680e5fe0c8";

struct Relay {
    address: SocketAddr,
    directory: tempfile::TempDir,
    stop: Option<oneshot::Sender<()>>,
    serving: JoinHandle<()>,
}

impl Relay {
    fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir(directory.path().join(relay::BY_ID)).unwrap();
        let listener = relay::listen("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = listener.local_addr().unwrap();
        let (stop, stopped) = oneshot::channel::<()>();
        let run_dir = directory.path().to_owned();
        let serving = tokio::spawn(async move {
            let stopped = async {
                let _ = stopped.await;
            };
            relay::serve(listener, &run_dir, RelayCounts::default(), stopped).await;
        });
        Self { address, directory, stop: Some(stop), serving }
    }

    /// A guest's socket, linked as warrend does.
    fn guest(&self) -> UnixListener {
        let socket = self.directory.path().join("vm-1.sock");
        let link = self.directory.path().join(format!("by-id/{ID}.sock"));
        std::os::unix::fs::symlink(&socket, link).unwrap();
        UnixListener::bind(&socket).unwrap()
    }

    async fn send(&self, bytes: &[u8]) -> TcpStream {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        stream.write_all(bytes).await.unwrap();
        stream
    }

    /// The status that is answered, after which the connection ends.
    async fn status(&self, bytes: &[u8]) -> String {
        let mut answer = String::new();
        self.send(bytes).await.read_to_string(&mut answer).await.unwrap();
        answer.split(' ').nth(1).unwrap_or_default().to_owned()
    }
}

fn connect() -> Vec<u8> {
    format!("CONNECT {ID}:80 HTTP/1.1\r\nhost: {ID}:80\r\n\r\n").into_bytes()
}

async fn read(stream: &mut (impl AsyncReadExt + Unpin), expected: &[u8]) {
    let mut bytes = vec![0; expected.len()];
    stream.read_exact(&mut bytes).await.unwrap();
    assert_eq!(bytes, expected);
}

async fn no_more(stream: &mut (impl AsyncReadExt + Unpin)) {
    assert_eq!(stream.read(&mut [0]).await.unwrap(), 0);
}

#[tokio::test]
async fn bytes_go_both_ways_and_each_way_ends_alone() {
    let relay = Relay::start();
    let guest = relay.guest();
    // Some come with the head.
    let mut gateway = relay.send(&[connect(), b"first".to_vec()].concat()).await;
    let (mut guest, _) = guest.accept().await.unwrap();
    read(&mut guest, b"CONNECT 80\n").await;
    guest.write_all(b"OK 1024\n").await.unwrap();
    read(&mut gateway, b"HTTP/1.1 200 OK\r\n\r\n").await;
    read(&mut guest, b"first").await;
    gateway.write_all(b"last").await.unwrap();
    gateway.shutdown().await.unwrap();
    read(&mut guest, b"last").await;
    no_more(&mut guest).await;
    guest.write_all(b"still there").await.unwrap();
    drop(guest);
    read(&mut gateway, b"still there").await;
    no_more(&mut gateway).await;
}

#[tokio::test]
async fn what_cannot_be_relayed_is_refused() {
    let relay = Relay::start();
    assert_eq!(relay.status(&connect()).await, "404");
    assert_eq!(relay.status(b"GET / HTTP/1.1\r\n\r\n").await, "400");
    assert_eq!(relay.status(b"CONNECT ../x:80 HTTP/1.1\r\n\r\n").await, "400");
    // A head that does not end.
    let endless = [b"CONNECT x:80 HTTP/1.1\r\nx: ".to_vec(), vec![b'x'; 1024]].concat();
    assert_eq!(relay.status(&endless[..1024]).await, "400");
    let listener = relay.guest();
    for answer in [&b""[..], b"NO 80\n"] {
        let refuse = async {
            let (mut guest, _) = listener.accept().await.unwrap();
            read(&mut guest, b"CONNECT 80\n").await;
            guest.write_all(answer).await.unwrap();
        };
        let request = connect();
        let (status, ()) = tokio::join!(relay.status(&request), refuse);
        assert_eq!(status, "502");
    }
    // The socket of a microVM that was killed.
    drop(listener);
    assert_eq!(relay.status(&connect()).await, "502");
}

#[tokio::test]
async fn told_to_stop_it_takes_who_knocked_already_and_ends_with_the_last() {
    let mut relay = Relay::start();
    let listener = relay.guest();
    let mut gateway = relay.send(&connect()).await;
    relay.stop.take().unwrap().send(()).unwrap();
    let (mut guest, _) = listener.accept().await.unwrap();
    read(&mut guest, b"CONNECT 80\n").await;
    guest.write_all(b"OK 1024\nhello").await.unwrap();
    read(&mut gateway, b"HTTP/1.1 200 OK\r\n\r\nhello").await;
    assert!(!relay.serving.is_finished());
    // Its successor can have the address already.
    assert!(relay::listen(relay.address).is_ok());
    drop((gateway, guest));
    relay.serving.await.unwrap();
}

#[tokio::test]
async fn a_run_directory_that_is_not_there_is_no_instance() {
    let relay = Relay::start();
    std::fs::remove_dir(Path::new(relay.directory.path()).join(relay::BY_ID)).unwrap();
    assert_eq!(relay.status(&connect()).await, "404");
}
