//! Asking all hosts and proxies at once.

use std::future::Future;
use std::time::Duration;

use tokio::task::JoinSet;
use tonic::{Response, Status};

use crate::fleet::{Agent, Fleet, Role};

/// An agent that did not answer by then is told of as one that does not.
const PATIENCE: Duration = Duration::from_secs(10);

/// No host or proxy that could be asked has this name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("there is no {what} \"{name}\": `warren host ls` lists them")]
pub struct Unknown {
    what: &'static str,
    name: String,
}

/// What one of them said.
pub struct Answer<T> {
    /// Its name.
    pub host: String,
    /// What it is.
    pub role: Role,
    /// Its answer, or why there is none, for people.
    pub answer: Result<T, String>,
}

/// Whom to ask.
#[derive(Clone, Copy, Debug)]
pub struct Whom<'a> {
    /// Only those of this role.
    pub role: Option<Role>,
    /// Only the one with this name; empty: all of them.
    pub name: &'a str,
    /// Who does not answer within this time has a problem; [`Whom::new`] gives 10 s.
    pub patience: Duration,
}

impl<'a> Whom<'a> {
    /// Those of a role, or all; only the one with this name, unless it is empty.
    pub fn new(role: Option<Role>, name: &'a str) -> Self {
        Self { role, name, patience: PATIENCE }
    }
}

/// Asks them. Answers come in the order of their names.
pub async fn ask<T, F>(
    fleet: &Fleet,
    whom: Whom<'_>,
    question: impl Fn(Agent) -> F,
) -> Result<Vec<Answer<T>>, Unknown>
where
    T: Send + 'static,
    F: Future<Output = Result<Response<T>, Status>> + Send + 'static,
{
    let Whom { role: wanted, name, patience } = whom;
    let mut peers = fleet.peers();
    peers.retain(|_, peer| wanted.is_none_or(|role| role == peer.role));
    if !name.is_empty() {
        peers.retain(|other, _| other == name);
        if peers.is_empty() {
            let what = if wanted == Some(Role::Host) { "host" } else { "host or proxy" };
            return Err(Unknown { what, name: name.to_owned() });
        }
    }
    let mut questions = JoinSet::new();
    for (host, peer) in peers {
        let asked = peer.open.map(|(_, agent)| question(agent));
        questions.spawn(async move {
            let answer = match asked {
                None => Err("it is not alive: is warrend running there?".to_owned()),
                Some(asked) => match tokio::time::timeout(patience, asked).await {
                    Ok(Ok(answer)) => Ok(answer.into_inner()),
                    Ok(Err(status)) => Err(status.message().to_owned()),
                    Err(_) => {
                        Err(format!("its agent did not answer within {} s", patience.as_secs()))
                    }
                },
            };
            Answer { host, role: peer.role, answer }
        });
    }
    let mut answers = questions.join_all().await;
    answers.sort_by(|one, other| one.host.cmp(&other.host));
    Ok(answers)
}
