//! A control plane that tells what the test says.

use std::sync::{Arc, Mutex};

use tokio::sync::mpsc;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::{Request, Response, Status};
use warren_proto::server::Services;
use warren_proto::v1::data_flow_service_server::{DataFlowService, DataFlowServiceServer};
use warren_proto::v1::watch_data_flow_response::Change;
use warren_proto::v1::{WatchDataFlowRequest, WatchDataFlowResponse};

type Message = Result<WatchDataFlowResponse, Status>;

#[derive(Default)]
struct State {
    told: Vec<Change>,
    watchers: Vec<mpsc::UnboundedSender<Message>>,
}

#[derive(Clone, Default)]
pub struct Control(Arc<Mutex<State>>);

impl Control {
    /// Tells a change to all who watch, and to those who will.
    pub fn tell(&self, change: Change) {
        let mut state = self.0.lock().unwrap();
        let message = WatchDataFlowResponse { change: Some(change.clone()) };
        state.watchers.retain(|watcher| watcher.send(Ok(message.clone())).is_ok());
        state.told.push(change);
    }

    pub fn services(&self) -> Services {
        Services::default().with(DataFlowServiceServer::new(self.clone()))
    }
}

#[tonic::async_trait]
impl DataFlowService for Control {
    type WatchDataFlowStream = UnboundedReceiverStream<Message>;

    async fn watch_data_flow(
        &self,
        _: Request<WatchDataFlowRequest>,
    ) -> Result<Response<Self::WatchDataFlowStream>, Status> {
        let (sender, receiver) = mpsc::unbounded_channel();
        let mut state = self.0.lock().unwrap();
        for change in state.told.iter().cloned().chain([Change::Complete(true)]) {
            sender.send(Ok(WatchDataFlowResponse { change: Some(change) })).unwrap();
        }
        state.watchers.push(sender);
        Ok(Response::new(UnboundedReceiverStream::new(receiver)))
    }
}
