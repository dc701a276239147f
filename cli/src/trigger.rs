//! `warren trigger`.

use clap::{Args, Subcommand};
use warren_proto::v1::trigger::Kind;
use warren_proto::v1::{EventTrigger, HttpTrigger, TimerTrigger, Trigger};

use crate::args::Output;
use crate::client::Client;
use crate::commands::print;
use crate::duration::Milliseconds;
use crate::error::Error;
use crate::render::{self, DeletedRow, TriggerRow};

#[derive(Debug, Subcommand)]
pub enum TriggerCommand {
    /// Have a function answer calls.
    #[command(subcommand)]
    Add(Add),
    /// List the triggers.
    Ls {
        /// Only of this function.
        #[arg(long, value_name = "NAME")]
        function: Option<String>,
    },
    /// Remove triggers.
    Rm {
        /// Triggers.
        #[arg(required = true, value_name = "NAME")]
        names: Vec<String>,
    },
}

#[derive(Debug, Subcommand)]
pub enum Add {
    /// HTTP calls: of one path, or a whole site.
    Http {
        #[command(flatten)]
        target: Target,
        /// The host name that is called; any otherwise.
        #[arg(long, value_name = "NAME", default_value = "", hide_default_value = true)]
        host: String,
        /// What the path begins with, in whole segments, such as /shop; any path otherwise. The longest
        /// one that fits wins.
        #[arg(long, value_name = "PATH", default_value = "", hide_default_value = true)]
        prefix: String,
        /// Have the function see the path without the prefix.
        #[arg(long)]
        strip: bool,
    },
    /// Calls that nobody waits for: POST /async/NAME of a gateway.
    Event {
        #[command(flatten)]
        target: Target,
        /// How often a call that failed is made again, each time after twice the time.
        #[arg(long, value_name = "NUMBER", default_value_t = 2)]
        retries: u32,
        /// The first time until that.
        #[arg(long, value_name = "TIME", default_value = "1s")]
        backoff: Milliseconds,
        /// Event trigger that gets what failed in the end.
        #[arg(long, value_name = "NAME", default_value = "", hide_default_value = true)]
        dead_letter: String,
    },
    /// Calls by the clock.
    Timer {
        #[command(flatten)]
        target: Target,
        /// Five fields as of crontab(5), in UTC, such as '*/5 * * * *'.
        #[arg(long)]
        cron: String,
    },
}

#[derive(Debug, Args)]
pub struct Target {
    /// Name of the trigger: lower-case letters, digits and inner hyphens.
    pub name: String,
    /// Function.
    #[arg(long, value_name = "NAME")]
    pub function: String,
    /// Alias or number of the version that answers; the last version otherwise.
    #[arg(long, value_name = "ALIAS", default_value = "$LATEST", hide_default_value = true)]
    pub alias: String,
}

impl From<Add> for Trigger {
    fn from(add: Add) -> Self {
        let (target, kind) = match add {
            Add::Http { target, host, prefix, strip } => {
                (target, Kind::Http(HttpTrigger { host, prefix, strip }))
            }
            Add::Event { target, retries, backoff: Milliseconds(backoff_ms), dead_letter } => {
                (target, Kind::Event(EventTrigger { retries, backoff_ms, dead_letter }))
            }
            Add::Timer { target, cron } => (target, Kind::Timer(TimerTrigger { cron })),
        };
        let Target { name, function, alias } = target;
        Self { name, function, alias, kind: Some(kind) }
    }
}

/// Runs the command.
pub async fn run(mut client: Client, output: Output, command: TriggerCommand) -> Result<(), Error> {
    match command {
        TriggerCommand::Add(add) => {
            let trigger = client.create_trigger(add.into()).await?;
            print(&render::one(output, &TriggerRow::from(trigger)))
        }
        TriggerCommand::Ls { function } => {
            let triggers = client.triggers(function.unwrap_or_default()).await?;
            let rows: Vec<_> = triggers.into_iter().map(TriggerRow::from).collect();
            print(&render::list(output, &rows))
        }
        TriggerCommand::Rm { names } => {
            let mut rows = Vec::new();
            for name in names {
                client.delete_trigger(name.clone()).await?;
                rows.push(DeletedRow { name });
            }
            print(&render::list(output, &rows))
        }
    }
}
