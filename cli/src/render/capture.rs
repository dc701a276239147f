//! The row of a capture.

use serde::Serialize;
use warren_proto::v1::CapturePacketsResponse;

use super::Row;

/// How a capture went.
#[derive(Serialize)]
pub struct CaptureRow {
    instance: String,
    inside: u64,
    outside: u64,
    inside_lost: u64,
    outside_lost: u64,
    /// Why it ended.
    ended: String,
}

impl CaptureRow {
    /// With how many packets were written of each side, and what was told last.
    pub fn new(
        instance: String,
        [inside, outside]: [u64; 2],
        told: &CapturePacketsResponse,
    ) -> Self {
        let CapturePacketsResponse { inside_lost, outside_lost, ref ended, .. } = *told;
        Self { instance, inside, outside, inside_lost, outside_lost, ended: ended.clone() }
    }
}

impl Row for CaptureRow {
    const HEADER: &'static [&'static str] =
        &["INSTANCE", "INSIDE", "OUTSIDE", "INSIDE LOST", "OUTSIDE LOST", "ENDED BY"];

    fn cells(&self) -> Vec<String> {
        vec![
            self.instance.clone(),
            self.inside.to_string(),
            self.outside.to_string(),
            self.inside_lost.to_string(),
            self.outside_lost.to_string(),
            self.ended.clone(),
        ]
    }
}
