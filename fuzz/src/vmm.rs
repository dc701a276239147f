//! Files that a VMM reads: functions, templates and diffs, from any bytes.

use warren_abi::microvm::{CODE_ADDRESS, DATA_ADDRESS};
use warren_vmm::function::Function;
use warren_vmm::snapshot;

/// Memory of the function's data, in bytes.
const DATA_BYTES: u64 = 4 << 20;

/// A function that is taken lies within its regions.
pub fn function(bytes: &[u8]) {
    let Ok(function) = Function::parse(bytes, Some(DATA_BYTES)) else { return };
    let place = &function.place;
    assert!((CODE_ADDRESS..place.code_end).contains(&place.entry));
    assert!(DATA_ADDRESS <= place.heap_start && place.heap_start < place.heap_end);
    assert_eq!(place.heap_end, DATA_ADDRESS + DATA_BYTES);
    for segment in &function.data {
        assert!(segment.start >= DATA_ADDRESS && segment.bytes.len() as u64 <= segment.size);
        assert!(segment.start + segment.size <= place.heap_start);
    }
    let code = function.code().expect("there is memory for it");
    assert_eq!(code.bytes, place.code_end - CODE_ADDRESS);
}

/// A file is refused or read, whatever is in it.
pub fn snapshot(bytes: &[u8]) {
    if let Ok(pages) = snapshot::examine(bytes.to_vec()) {
        assert!(pages * 4096 <= bytes.len());
    }
}
