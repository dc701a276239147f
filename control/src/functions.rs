//! Functions and their triggers: how they are kept and changed.
//!
//! [`model`] and [`triggers`] say what can be; [`publish`] makes a version's package; [`networks`]
//! has functions' VPCs on hosts before anything starts there; [`api`] answers requests; [`data_flow`]
//! tells gateways what they need, [`logs`] people what functions write, and [`timers`] which of them fires the timers.

pub mod api;
pub mod data_flow;
pub mod logs;
pub mod model;
pub mod networks;
pub mod publish;
pub mod timers;
pub mod triggers;

use warren_proto::v1;

use self::model::{Function, Version};
use self::triggers::{Trigger, Triggers, label};
use crate::store::{Entry, Precondition, Store, StoreError, Write, decode};
use crate::vpc;

/// Where functions are stored, each whole, so that it changes whole: `function/NAME`.
pub const FUNCTION_PREFIX: &str = "function/";
/// Where triggers are stored: `trigger/NAME`.
pub const TRIGGER_PREFIX: &str = "trigger/";

/// Why a function or a trigger was not read or changed.
#[derive(Debug, thiserror::Error)]
pub enum FunctionsError {
    /// Never deployed, or deleted.
    #[error("there is no function \"{0}\": `warren function ls` lists them")]
    Unknown(String),
    /// Never published, or dropped since.
    #[error(
        "function \"{function}\" has no version {version}: `warren function show {function}` lists them"
    )]
    UnknownVersion {
        /// Function.
        function: String,
        /// Number.
        version: u64,
    },
    /// Never set, or deleted.
    #[error(
        "function \"{function}\" has no alias \"{alias}\": `warren function alias ls {function}` lists them"
    )]
    UnknownAlias {
        /// Function.
        function: String,
        /// Alias.
        alias: String,
    },
    /// Never created.
    #[error("there is no VPC \"{0}\": `warren vpc create` makes one")]
    UnknownVpc(String),
    /// It has no microVMs of its own.
    #[error(
        "VPC {of} leaves by the addresses of VPC {vpc}, which has no functions of its own: deploy it in {of}"
    )]
    PublicVpc {
        /// VPC.
        vpc: String,
        /// The VPC whose public one it is.
        of: String,
    },
    /// A function stays where it is.
    #[error("function \"{function}\" is in VPC {vpc}: deploy it there, or under another name")]
    InOtherVpc {
        /// Function.
        function: String,
        /// Its VPC.
        vpc: String,
    },
    /// A field of a request cannot be used.
    #[error("{field}: {problem}")]
    Invalid {
        /// Its name.
        field: &'static str,
        /// What is wrong with it.
        problem: String,
    },
    /// An alias cannot be so.
    #[error("alias \"{alias}\" {problem}")]
    Alias {
        /// Alias.
        alias: String,
        /// What is wrong, and the remedy.
        problem: String,
    },
    /// There is no end to it otherwise.
    #[error(
        "function \"{0}\" has as many aliases as it can: delete one with `warren function alias rm`"
    )]
    TooManyAliases(String),
    /// There is nothing to go back to.
    #[error(
        "alias \"{alias}\" of function \"{function}\" was never anything else: there is nothing to roll back to"
    )]
    NothingBefore {
        /// Function.
        function: String,
        /// Alias.
        alias: String,
    },
    /// Calls would have nowhere to go.
    #[error(
        "trigger \"{trigger}\" leads to {what}: remove it first with `warren trigger rm {trigger}`"
    )]
    InUse {
        /// The function, or the alias.
        what: String,
        /// A trigger.
        trigger: String,
    },
    /// Never created, or deleted.
    #[error("there is no trigger \"{0}\": `warren trigger ls` lists them")]
    UnknownTrigger(String),
    /// The name is taken.
    #[error("there is another trigger \"{0}\": remove it first, or take another name")]
    TriggerExists(String),
    /// Only one function can answer a call.
    #[error("{route} is trigger \"{trigger}\"'s: remove it first, or take another host or prefix")]
    RouteTaken {
        /// Host and prefix.
        route: String,
        /// Whose they are.
        trigger: String,
    },
    /// Nobody gets what failed.
    #[error("there is no event trigger \"{0}\" for dead letters: add it first")]
    UnknownDeadLetter(String),
    /// Events that failed would be lost.
    #[error("trigger \"{trigger}\" gets the dead letters of \"{of}\": remove that first")]
    GetsDeadLetters {
        /// Trigger.
        trigger: String,
        /// Another one.
        of: String,
    },
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Whether a function may be deployed in a VPC.
pub async fn check_place(store: &dyn Store, name: &str, vpc: &str) -> Result<(), FunctionsError> {
    label("name", name)?;
    let definition = vpc::get(store, vpc).await?;
    let definition = definition.ok_or_else(|| FunctionsError::UnknownVpc(vpc.to_owned()))?;
    if let Some(of) = definition.public_of {
        return Err(FunctionsError::PublicVpc { vpc: vpc.to_owned(), of });
    }
    match read::<Function>(store, &function_key(name)).await?.1 {
        Some(known) => check_vpc(&known, vpc),
        None => Ok(()),
    }
}

/// Stores a version that was published; its number. `also` is written with it.
pub async fn add_version(
    store: &dyn Store,
    name: &str,
    vpc: &str,
    version: &Version,
    also: &[Write],
) -> Result<(Function, u64), FunctionsError> {
    let key = function_key(name);
    loop {
        let (entry, known) = read::<Function>(store, &key).await?;
        let mut function = known.unwrap_or_else(|| Function::new(name, vpc));
        check_vpc(&function, vpc)?;
        let triggers = triggers(store).await?;
        let leading = triggers.values().filter(|trigger| trigger.function == name);
        let number =
            function.publish(version.clone(), leading.map(|trigger| trigger.alias.as_str()));
        let mut writes = vec![Write::put(&key, &function)?];
        writes.extend_from_slice(also);
        if commit(store, vec![Precondition::unchanged(&key, entry.as_ref())], writes).await? {
            return Ok((function, number));
        }
    }
}

/// All functions, or those of a VPC.
pub async fn list(store: &dyn Store, vpc: &str) -> Result<Vec<Function>, FunctionsError> {
    let mut functions = Vec::new();
    for entry in store.list(FUNCTION_PREFIX).await?.1 {
        functions.push(decode::<Function>(&entry.key, &entry.value)?);
    }
    functions.retain(|function| vpc.is_empty() || function.vpc == vpc);
    Ok(functions)
}

/// The function of this name.
pub async fn get(store: &dyn Store, name: &str) -> Result<Function, FunctionsError> {
    Ok(known(store, name).await?.1)
}

/// Deletes a function that no trigger leads to.
pub async fn delete(store: &dyn Store, name: &str) -> Result<(), FunctionsError> {
    loop {
        let (entry, _) = known(store, name).await?;
        if let Some(trigger) = leading_to(store, name, None).await? {
            return Err(FunctionsError::InUse { what: format!("function \"{name}\""), trigger });
        }
        let gone = Write { key: entry.key.clone(), value: None };
        if commit(store, vec![Precondition::unchanged(&entry.key, Some(&entry))], vec![gone])
            .await?
        {
            return Ok(());
        }
    }
}

/// Has an alias stand for these versions.
pub async fn set_alias(
    store: &dyn Store,
    function: &str,
    alias: &str,
    shares: &[v1::WeightedVersion],
) -> Result<Function, FunctionsError> {
    change(store, function, |function| function.set_alias(alias, shares)).await
}

/// Has an alias stand for what it was before.
pub async fn roll_back(
    store: &dyn Store,
    function: &str,
    alias: &str,
) -> Result<Function, FunctionsError> {
    change(store, function, |function| function.roll_back(alias)).await
}

/// Deletes an alias that no trigger leads to.
pub async fn delete_alias(
    store: &dyn Store,
    function: &str,
    alias: &str,
) -> Result<(), FunctionsError> {
    loop {
        let (entry, mut changed) = known(store, function).await?;
        if changed.aliases.remove(alias).is_none() {
            let (function, alias) = (function.to_owned(), alias.to_owned());
            return Err(FunctionsError::UnknownAlias { function, alias });
        }
        if let Some(trigger) = leading_to(store, function, Some(alias)).await? {
            let what = format!("alias \"{alias}\" of function \"{function}\"");
            return Err(FunctionsError::InUse { what, trigger });
        }
        let unchanged = Precondition::unchanged(&entry.key, Some(&entry));
        if commit(store, vec![unchanged], vec![Write::put(&entry.key, &changed)?]).await? {
            return Ok(());
        }
    }
}

/// Makes a trigger; the same once more is no error.
pub async fn create_trigger(
    store: &dyn Store,
    message: v1::Trigger,
) -> Result<Trigger, FunctionsError> {
    let trigger = Trigger::new(message)?;
    let key = trigger_key(&trigger.name);
    loop {
        let (entry, function) = known(store, &trigger.function).await?;
        function.check_alias(&trigger.alias)?;
        let (revision, others) = triggers_at(store).await?;
        match others.get(&trigger.name) {
            Some(present) if *present == trigger => return Ok(trigger),
            Some(_) => return Err(FunctionsError::TriggerExists(trigger.name)),
            None => trigger.check_beside(&others)?,
        }
        // The function is written, too: who takes away what this leads to at the same time decides
        // anew. All triggers count themselves in one key, for they must stand beside each other.
        let preconditions = vec![
            Precondition::unchanged(&entry.key, Some(&entry)),
            Precondition { key: TRIGGERS_CHANGED.into(), revision },
        ];
        let writes = vec![
            Write::put(&key, &trigger)?,
            Write::put(&entry.key, &function)?,
            Write::put(TRIGGERS_CHANGED, &trigger.name)?,
        ];
        if commit(store, preconditions, writes).await? {
            return Ok(trigger);
        }
    }
}

/// All triggers, or those of a function.
pub async fn list_triggers(
    store: &dyn Store,
    function: &str,
) -> Result<Vec<Trigger>, FunctionsError> {
    let mut found: Vec<_> = triggers(store).await?.into_values().collect();
    found.retain(|trigger| function.is_empty() || trigger.function == function);
    Ok(found)
}

/// Deletes a trigger that gets nobody's dead letters.
pub async fn delete_trigger(store: &dyn Store, name: &str) -> Result<(), FunctionsError> {
    loop {
        let (revision, all) = triggers_at(store).await?;
        let trigger =
            all.get(name).ok_or_else(|| FunctionsError::UnknownTrigger(name.to_owned()))?;
        if let Some(of) = trigger.dead_letters_of(&all) {
            let (trigger, of) = (name.to_owned(), of.name.clone());
            return Err(FunctionsError::GetsDeadLetters { trigger, of });
        }
        let unchanged = Precondition { key: TRIGGERS_CHANGED.into(), revision };
        let gone = Write { key: trigger_key(name), value: None };
        let changed = Write::put(TRIGGERS_CHANGED, &name)?;
        if commit(store, vec![unchanged], vec![gone, changed]).await? {
            return Ok(());
        }
    }
}

/// Written with each change of any trigger.
const TRIGGERS_CHANGED: &str = "triggers-changed";

fn function_key(name: &str) -> String {
    format!("{FUNCTION_PREFIX}{name}")
}

fn trigger_key(name: &str) -> String {
    format!("{TRIGGER_PREFIX}{name}")
}

fn check_vpc(function: &Function, vpc: &str) -> Result<(), FunctionsError> {
    if function.vpc == vpc {
        return Ok(());
    }
    let (function, vpc) = (function.name.clone(), function.vpc.clone());
    Err(FunctionsError::InOtherVpc { function, vpc })
}

async fn read<T: serde::de::DeserializeOwned>(
    store: &dyn Store,
    key: &str,
) -> Result<(Option<Entry>, Option<T>), StoreError> {
    let entry = store.get(key).await?;
    let value = entry.as_ref().map(|entry| decode(key, &entry.value)).transpose()?;
    Ok((entry, value))
}

async fn known(store: &dyn Store, name: &str) -> Result<(Entry, Function), FunctionsError> {
    match read(store, &function_key(name)).await? {
        (Some(entry), Some(function)) => Ok((entry, function)),
        _ => Err(FunctionsError::Unknown(name.to_owned())),
    }
}

async fn triggers(store: &dyn Store) -> Result<Triggers, StoreError> {
    let mut triggers = Triggers::new();
    for entry in store.list(TRIGGER_PREFIX).await?.1 {
        let trigger: Trigger = decode(&entry.key, &entry.value)?;
        triggers.insert(trigger.name.clone(), trigger);
    }
    Ok(triggers)
}

/// All triggers, and the revision of their last change.
async fn triggers_at(store: &dyn Store) -> Result<(u64, Triggers), StoreError> {
    // Before they are read: a change in between is then a conflict.
    let changed = store.get(TRIGGERS_CHANGED).await?;
    Ok((changed.map_or(0, |entry| entry.revision), triggers(store).await?))
}

/// A trigger that leads to a function, or to an alias of it.
async fn leading_to(
    store: &dyn Store,
    function: &str,
    alias: Option<&str>,
) -> Result<Option<String>, StoreError> {
    let leads = |trigger: &Trigger| {
        trigger.function == function && alias.is_none_or(|alias| trigger.alias == alias)
    };
    Ok(triggers(store).await?.into_values().find(leads).map(|trigger| trigger.name))
}

/// Stores what becomes of a function.
async fn change(
    store: &dyn Store,
    name: &str,
    change: impl Fn(&mut Function) -> Result<(), FunctionsError>,
) -> Result<Function, FunctionsError> {
    loop {
        let (entry, before) = known(store, name).await?;
        let mut after = before.clone();
        change(&mut after)?;
        if after == before {
            return Ok(after);
        }
        let unchanged = Precondition::unchanged(&entry.key, Some(&entry));
        if commit(store, vec![unchanged], vec![Write::put(&entry.key, &after)?]).await? {
            return Ok(after);
        }
    }
}

/// False: someone else changed it meanwhile, and it is to be decided anew.
async fn commit(
    store: &dyn Store,
    preconditions: Vec<Precondition>,
    writes: Vec<Write>,
) -> Result<bool, StoreError> {
    match store.commit(preconditions, writes).await {
        Ok(_) => Ok(true),
        Err(StoreError::Conflict(_)) => Ok(false),
        Err(error) => Err(error),
    }
}
