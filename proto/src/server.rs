//! One gRPC server on several endpoints, with health checking and reflection.

use std::convert::Infallible;
use std::fs;
use std::future::Future;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::net::{TcpListener, UnixListener, UnixStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::body::Body;
use tonic::codegen::{Service, http};
use tonic::server::NamedService;
use tonic::service::{Routes, RoutesBuilder};
use tonic::transport::server::{Server, TcpIncoming};
use tonic_health::ServingStatus;

use crate::endpoint::Endpoint;
use crate::v1::DESCRIPTOR_SET;

/// Calls that run when the server is told to stop have this long to end.
const GRACE: Duration = Duration::from_secs(2);
/// A peer that is gone without a word is asked this often, and given up when it does not answer.
const KEEPALIVE: Duration = Duration::from_secs(10);
const HEALTH: &str = "grpc.health.v1.Health";

/// Why a server could not listen or serve.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The endpoint is taken.
    #[error("cannot listen at {0}: another process does; stop it or choose another endpoint")]
    Taken(Endpoint),
    /// The socket's path is something else.
    #[error(
        "cannot listen at {0}: that path is not a socket; remove it or choose another endpoint"
    )]
    NotASocket(Endpoint),
    /// The operating system refused.
    #[error("cannot listen at {endpoint}: {source}")]
    Listen {
        /// Where.
        endpoint: Endpoint,
        /// Why.
        source: io::Error,
    },
    /// Accepting connections failed.
    #[error("serving at {endpoint} failed: {source}")]
    Serve {
        /// Where.
        endpoint: Endpoint,
        /// Why.
        source: tonic::transport::Error,
    },
    /// The descriptors compiled into this program do not decode.
    #[error("the built-in protobuf descriptors are damaged: {0}")]
    Descriptors(#[from] tonic_reflection::server::Error),
}

/// The gRPC services of one server. Health checking and reflection come by themselves.
#[derive(Default)]
pub struct Services {
    routes: RoutesBuilder,
    names: Vec<&'static str>,
}

impl Services {
    /// Adds a service, such as `AgentServiceServer::new(agent)`.
    #[must_use]
    pub fn with<S>(mut self, service: S) -> Self
    where
        S: Service<
                http::Request<Body>,
                Response = http::Response<Body>,
                Error = Infallible,
                Future: Send + 'static,
            > + NamedService
            + Clone
            + Send
            + Sync
            + 'static,
    {
        self.routes.add_service(service);
        self.names.push(S::NAME);
        self
    }
}

/// Bound endpoints that nobody serves yet: connections queue up.
pub struct Listeners(Vec<Listener>);

struct Listener {
    endpoint: Endpoint,
    socket: Socket,
}

enum Socket {
    Tcp(TcpListener),
    Unix(UnixListener, SocketFile),
}

impl Listeners {
    /// Binds each endpoint, or none of them.
    ///
    /// A Unix socket gets mode 0600 (its directory is made if it is missing); one that a dead
    /// process left is replaced. TCP port 0 takes a free port: see [`Self::endpoints`].
    pub async fn bind(endpoints: &[Endpoint]) -> Result<Self, ServeError> {
        let mut listeners = Vec::with_capacity(endpoints.len());
        for endpoint in endpoints {
            listeners.push(match endpoint {
                Endpoint::Tcp(address) => {
                    let listener = TcpListener::bind(address).await.map_err(because(endpoint))?;
                    let address = listener.local_addr().map_err(because(endpoint))?;
                    Listener { endpoint: Endpoint::Tcp(address), socket: Socket::Tcp(listener) }
                }
                Endpoint::Unix(path) => {
                    make_way(endpoint, path).await?;
                    let (listener, file) = bind_unix(path).map_err(because(endpoint))?;
                    let socket = Socket::Unix(listener, file);
                    Listener { endpoint: endpoint.clone(), socket }
                }
            });
        }
        Ok(Self(listeners))
    }

    /// What was bound, with the ports that the operating system chose.
    pub fn endpoints(&self) -> Vec<Endpoint> {
        self.0.iter().map(|listener| listener.endpoint.clone()).collect()
    }

    /// Serves until `shutdown` completes; calls that still run then have 2 s to end. Unix sockets
    /// are removed at the end.
    pub async fn serve(
        self,
        services: Services,
        shutdown: impl Future<Output = ()>,
    ) -> Result<(), ServeError> {
        let (health, routes) = with_health_and_reflection(services).await?;
        let (stop, _) = watch::channel(());
        let mut servers = JoinSet::new();
        for Listener { endpoint, socket } in self.0 {
            let routes = routes.clone();
            let mut stopped = stop.subscribe();
            let stopped = async move {
                let _ = stopped.changed().await;
            };
            servers.spawn(async move {
                let server =
                    Server::builder().http2_keepalive_interval(Some(KEEPALIVE)).add_routes(routes);
                match socket {
                    Socket::Tcp(listener) => {
                        let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
                        server.serve_with_incoming_shutdown(incoming, stopped).await
                    }
                    Socket::Unix(listener, _file) => {
                        let incoming = UnixListenerStream::new(listener);
                        server.serve_with_incoming_shutdown(incoming, stopped).await
                    }
                }
                .map_err(|source| ServeError::Serve { endpoint, source })
            });
        }
        let all_ended = async {
            while let Some(ended) = servers.join_next().await {
                // A panic in a server is ours: let it be seen.
                ended.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()))?;
            }
            Ok(())
        };
        tokio::pin!(all_ended);
        tokio::select! {
            // Servers do not end by themselves, but for an error.
            ended = &mut all_ended => return ended,
            () = shutdown => {}
        }
        health.set_service_status("", ServingStatus::NotServing).await;
        let _ = stop.send(());
        tokio::time::timeout(GRACE, all_ended).await.unwrap_or(Ok(()))
    }
}

async fn with_health_and_reflection(
    services: Services,
) -> Result<(tonic_health::server::HealthReporter, Routes), ServeError> {
    let (reporter, health) = tonic_health::server::health_reporter();
    let reflection = || {
        let builder = tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
            .with_service_name(HEALTH);
        services.names.iter().fold(builder, |builder, name| builder.with_service_name(*name))
    };
    let mut routes = services.routes;
    routes.add_service(health).add_service(reflection().build_v1()?);
    // The grpcurl that distributions ship asks in this version only.
    routes.add_service(reflection().build_v1alpha()?);
    for name in services.names {
        reporter.set_service_status(name, ServingStatus::Serving).await;
    }
    Ok((reporter, routes.routes().prepare()))
}

fn because(endpoint: &Endpoint) -> impl Fn(io::Error) -> ServeError {
    move |source| match source.kind() {
        io::ErrorKind::AddrInUse => ServeError::Taken(endpoint.clone()),
        _ => ServeError::Listen { endpoint: endpoint.clone(), source },
    }
}

/// Fails if a live server or something that is no socket stands at the path. A dead server's
/// socket is left: [`bind_unix`] replaces it.
async fn make_way(endpoint: &Endpoint, path: &Path) -> Result<(), ServeError> {
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let Some(directory) = path.parent() else {
                return Ok(());
            };
            fs::create_dir_all(directory).map_err(because(endpoint))
        }
        Err(error) => Err(because(endpoint)(error)),
        Ok(metadata) if !metadata.file_type().is_socket() => {
            Err(ServeError::NotASocket(endpoint.clone()))
        }
        Ok(_) => match UnixStream::connect(path).await {
            Ok(_) => Err(ServeError::Taken(endpoint.clone())),
            Err(_) => Ok(()),
        },
    }
}

/// Binds beside the path and renames: so it is never there with another mode than 0600, nor
/// without a listener.
fn bind_unix(path: &Path) -> io::Result<(UnixListener, SocketFile)> {
    let mut beside = path.as_os_str().to_owned();
    beside.push(format!(".{}", std::process::id()));
    let beside = PathBuf::from(beside);
    match fs::remove_file(&beside) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(&beside)?;
    let inode = fs::symlink_metadata(&beside)?.ino();
    fs::set_permissions(&beside, fs::Permissions::from_mode(0o600))?;
    fs::rename(&beside, path)?;
    Ok((listener, SocketFile { path: path.to_owned(), inode }))
}

/// Removes the socket at the end, unless another server took its place meanwhile.
struct SocketFile {
    path: PathBuf,
    inode: u64,
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if fs::symlink_metadata(&self.path).is_ok_and(|metadata| metadata.ino() == self.inode)
            && let Err(error) = fs::remove_file(&self.path)
        {
            tracing::warn!(path = %self.path.display(), %error, "the socket could not be removed");
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::oneshot;
    use tonic_health::pb::HealthCheckRequest;
    use tonic_health::pb::health_client::HealthClient;
    use tonic_reflection::pb::v1::ServerReflectionRequest;
    use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
    use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
    use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;

    use super::*;
    use crate::endpoint::connect;

    async fn reflected_services(endpoint: &Endpoint) -> Vec<String> {
        let mut client = ServerReflectionClient::new(connect(endpoint).await.unwrap());
        let list = MessageRequest::ListServices(String::new());
        let request = ServerReflectionRequest { message_request: Some(list), ..Default::default() };
        let answers = client.server_reflection_info(tokio_stream::once(request)).await.unwrap();
        let answer = answers.into_inner().message().await.unwrap().unwrap();
        let Some(MessageResponse::ListServicesResponse(list)) = answer.message_response else {
            panic!("{answer:?}")
        };
        list.service.into_iter().map(|service| service.name).collect()
    }

    #[tokio::test]
    async fn serves_on_each_endpoint_and_leaves_no_socket() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("made/for/it.sock");
        let endpoints = [Endpoint::Unix(path.clone()), "http://127.0.0.1:0".parse().unwrap()];
        let listeners = Listeners::bind(&endpoints).await.unwrap();
        let bound = listeners.endpoints();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);

        let (stop, stopped) = oneshot::channel::<()>();
        let serving = tokio::spawn(listeners.serve(Services::default(), async {
            let _ = stopped.await;
        }));
        for endpoint in &bound {
            let mut client = HealthClient::new(connect(endpoint).await.unwrap());
            let reply = client.check(HealthCheckRequest::default()).await.unwrap().into_inner();
            assert_eq!(reply.status, 1, "SERVING at {endpoint}");
            assert_eq!(reflected_services(endpoint).await, [HEALTH]);
        }
        stop.send(()).unwrap();
        serving.await.unwrap().unwrap();
        assert!(!path.exists());
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 0);
    }

    #[tokio::test]
    async fn replaces_a_dead_socket_but_no_live_one_and_no_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.sock");
        let endpoint = Endpoint::Unix(path.clone());
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        let first = Listeners::bind(std::slice::from_ref(&endpoint)).await.unwrap();
        let error = Listeners::bind(std::slice::from_ref(&endpoint)).await.err().unwrap();
        assert!(matches!(error, ServeError::Taken(_)), "{error}");
        drop(first);
        assert!(!path.exists());

        fs::write(&path, "precious").unwrap();
        let error = Listeners::bind(&[endpoint]).await.err().unwrap();
        assert!(matches!(error, ServeError::NotASocket(_)), "{error}");
        assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
    }
}
