//! How each error is told to gRPC clients: the code for programs, the text for people.

use tonic::{Code, Status};
use warren_function::jailed::JailedError;
use warren_function::repository::StoreError as PackageError;
use warren_placement::PlacementError;

use crate::deploy::DeployError;
use crate::drops::DropsError;
use crate::fleet::{DrainError, ForgetError, InstanceError, RegisterError};
use crate::flows::FlowsError;
use crate::functions::FunctionsError;
use crate::functions::publish::PublishError;
use crate::routes::RoutesError;
use crate::security::SecurityError;
use crate::snapshots::SnapshotsError;
use crate::store::StoreError;
use crate::vpc::CreateVpcError;

fn status(code: Code, error: &impl std::error::Error) -> Status {
    Status::new(code, error.to_string())
}

/// An agent's error, with the name of its host in front.
pub fn of_agent(host: &str, error: &Status) -> Status {
    Status::with_details(
        error.code(),
        format!("host {host}: {}", error.message()),
        error.details().to_vec().into(),
    )
}

impl From<StoreError> for Status {
    fn from(error: StoreError) -> Self {
        let code = match &error {
            StoreError::Conflict(_) => Code::Aborted,
            StoreError::TooLarge(_)
            | StoreError::Open { .. }
            | StoreError::Value { .. }
            | StoreError::Database(_) => Code::Internal,
        };
        status(code, &error)
    }
}

impl From<CreateVpcError> for Status {
    fn from(error: CreateVpcError) -> Self {
        let code = match error {
            CreateVpcError::Store(error) => return error.into(),
            CreateVpcError::Invalid(_) => Code::InvalidArgument,
            CreateVpcError::Exists(_) | CreateVpcError::AddressTaken { .. } => Code::AlreadyExists,
            CreateVpcError::NotPublic { .. } => Code::FailedPrecondition,
            CreateVpcError::Unknown(_) => Code::NotFound,
            CreateVpcError::NoVniLeft => Code::ResourceExhausted,
        };
        status(code, &error)
    }
}

/// Why no host was found. Not by [`From`]: both types are other crates'.
pub fn of_placement(error: &PlacementError) -> Status {
    let code = match error {
        PlacementError::UnknownHost(_)
        | PlacementError::NotThere { .. }
        | PlacementError::NoTemplate { .. } => Code::NotFound,
        PlacementError::DeadHost(_) | PlacementError::NoHost => Code::Unavailable,
        PlacementError::FullHost { .. } | PlacementError::Full { .. } => Code::ResourceExhausted,
    };
    status(code, error)
}

impl From<DeployError> for Status {
    fn from(error: DeployError) -> Self {
        let code = match &error {
            DeployError::UnknownVpc(_) => Code::NotFound,
            DeployError::NoProxy(_) | DeployError::IsPublic { .. } => Code::FailedPrecondition,
            DeployError::NoPorts { .. } => Code::ResourceExhausted,
            DeployError::Refused { status, .. } => status.code(),
            DeployError::HostLost { .. } => Code::Unavailable,
            DeployError::Late { .. } => Code::DeadlineExceeded,
            DeployError::Store(_) => Code::Internal,
        };
        status(code, &error)
    }
}

impl From<DropsError> for Status {
    fn from(error: DropsError) -> Self {
        match error {
            DropsError::Unknown(_) => status(Code::NotFound, &error),
            DropsError::Store(error) => error.into(),
        }
    }
}

impl From<FlowsError> for Status {
    fn from(error: FlowsError) -> Self {
        match error {
            FlowsError::Host(_) | FlowsError::Vpc(_) => status(Code::NotFound, &error),
            FlowsError::Instance(error) => error.into(),
            FlowsError::Store(error) => error.into(),
        }
    }
}

impl From<RegisterError> for Status {
    fn from(error: RegisterError) -> Self {
        let code = match &error {
            RegisterError::Invalid { .. } => Code::InvalidArgument,
            RegisterError::OtherRole(_) | RegisterError::Unreachable { .. } => {
                Code::FailedPrecondition
            }
            RegisterError::Replaced(_) => Code::Aborted,
            RegisterError::Store(_) => Code::Internal,
        };
        status(code, &error)
    }
}

impl From<ForgetError> for Status {
    fn from(error: ForgetError) -> Self {
        let code = match error {
            ForgetError::Store(error) => return error.into(),
            ForgetError::Unknown(_) => Code::NotFound,
            ForgetError::Alive(_) => Code::FailedPrecondition,
        };
        status(code, &error)
    }
}

impl From<DrainError> for Status {
    fn from(error: DrainError) -> Self {
        let code = match error {
            DrainError::Store(error) => return error.into(),
            DrainError::Unknown(_) => Code::NotFound,
            DrainError::Host(_) => Code::FailedPrecondition,
        };
        status(code, &error)
    }
}

impl From<InstanceError> for Status {
    fn from(error: InstanceError) -> Self {
        let code = match error {
            InstanceError::Unknown(_) => Code::NotFound,
            InstanceError::DeadHost { .. } => Code::Unavailable,
        };
        status(code, &error)
    }
}

impl From<SnapshotsError> for Status {
    fn from(error: SnapshotsError) -> Self {
        let code = match error {
            SnapshotsError::Instance(error) => return error.into(),
            SnapshotsError::Host(_) | SnapshotsError::Unknown(_) => Code::NotFound,
            SnapshotsError::Exists { .. } => Code::AlreadyExists,
            SnapshotsError::Silent { .. } => Code::Unavailable,
            SnapshotsError::Elsewhere { .. } => Code::FailedPrecondition,
        };
        status(code, &error)
    }
}

impl From<RoutesError> for Status {
    fn from(error: RoutesError) -> Self {
        let code = match error {
            RoutesError::Store(error) => return error.into(),
            RoutesError::UnknownVpc(_) | RoutesError::NoRoute { .. } => Code::NotFound,
            RoutesError::Exists { .. } => Code::AlreadyExists,
            RoutesError::Route(_) | RoutesError::Table(_) => Code::InvalidArgument,
        };
        status(code, &error)
    }
}

impl From<SecurityError> for Status {
    fn from(error: SecurityError) -> Self {
        let code = match error {
            SecurityError::Store(error) => return error.into(),
            SecurityError::UnknownVpc(_)
            | SecurityError::UnknownGroup { .. }
            | SecurityError::NoRule { .. } => Code::NotFound,
            SecurityError::Exists { .. } => Code::AlreadyExists,
            SecurityError::IsDefault { .. } | SecurityError::InUse { .. } => {
                Code::FailedPrecondition
            }
            SecurityError::Name(_)
            | SecurityError::Rule(_)
            | SecurityError::Limits(_)
            | SecurityError::TooManyRules { .. }
            | SecurityError::TooManyGroups(_) => Code::InvalidArgument,
        };
        status(code, &error)
    }
}

impl From<FunctionsError> for Status {
    fn from(error: FunctionsError) -> Self {
        let code = match error {
            FunctionsError::Store(error) => return error.into(),
            FunctionsError::Unknown(_)
            | FunctionsError::UnknownVersion { .. }
            | FunctionsError::UnknownAlias { .. }
            | FunctionsError::UnknownVpc(_)
            | FunctionsError::UnknownTrigger(_)
            | FunctionsError::UnknownDeadLetter(_) => Code::NotFound,
            FunctionsError::PublicVpc { .. }
            | FunctionsError::InOtherVpc { .. }
            | FunctionsError::NothingBefore { .. }
            | FunctionsError::InUse { .. }
            | FunctionsError::GetsDeadLetters { .. } => Code::FailedPrecondition,
            FunctionsError::Invalid { .. } | FunctionsError::Alias { .. } => Code::InvalidArgument,
            FunctionsError::TooManyAliases(_) => Code::ResourceExhausted,
            FunctionsError::TriggerExists(_) | FunctionsError::RouteTaken { .. } => {
                Code::AlreadyExists
            }
        };
        status(code, &error)
    }
}

impl From<PublishError> for Status {
    fn from(error: PublishError) -> Self {
        let code = match error {
            PublishError::Function(error) => return error.into(),
            PublishError::Store(error) => return error.into(),
            PublishError::Order
            | PublishError::Options(_)
            | PublishError::Compile(JailedError::Refused(_) | JailedError::Forbidden) => {
                Code::InvalidArgument
            }
            PublishError::Upload(ref status) => status.code(),
            PublishError::Slow | PublishError::Compile(JailedError::TimedOut(_)) => {
                Code::DeadlineExceeded
            }
            PublishError::TooLarge | PublishError::Compile(JailedError::OutOfMemory(_)) => {
                Code::ResourceExhausted
            }
            PublishError::Repository(
                PackageError::Unreachable { .. } | PackageError::Silent { .. },
            ) => Code::Unavailable,
            PublishError::Spool(_)
            | PublishError::Compiler { .. }
            | PublishError::Compile(_)
            | PublishError::Repository(_) => Code::Internal,
        };
        status(code, &error)
    }
}
