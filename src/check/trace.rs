//! Traces of bases.

use std::io;

use super::{Check, CheckError};
use crate::format::layout::{STAGED_SUFFIX, TRACE_SUFFIX, TRACES, base_path, base_record, number};
use crate::format::trace::{MAX_FILE, Trace};

impl Check<'_> {
    /// Invariant 13. Returns the number of sound traces. A trace only makes a boot faster, so a damaged one is repaired by
    /// removing it.
    pub(super) fn traces(&mut self, bases: &[String]) -> Result<u64, CheckError> {
        let names = match self.medium.list(TRACES) {
            Ok(names) => names,
            // The directory is created with the first trace.
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(0),
            Err(error) => {
                return Err(CheckError::Io { operation: "reading", path: self.store.join(TRACES), error });
            }
        };
        let mut sound = 0;
        for name in names {
            let path = format!("{TRACES}/{name}");
            if name.ends_with(STAGED_SUFFIX) {
                self.stray(TRACES, &name, None, "left by an unclean stop");
                continue;
            }
            let Some(base) = name.strip_suffix(TRACE_SUFFIX).and_then(number) else {
                self.foreign(path);
                continue;
            };
            let why = match self.read(&path, MAX_FILE) {
                Ok(bytes) => Trace::decode(&bytes).err().map(|error| error.to_string()),
                Err(error) => Some(format!("it cannot be read: {error}")),
            };
            let has_base = bases.contains(&base_record(base));
            let why = why.or_else(|| (!has_base).then(|| format!("there is no {}", base_path(base))));
            let Some(why) = why else {
                sound += 1;
                continue;
            };
            self.repairable(13, path.clone(), format!("{why}; the trace cannot be used"), None, |medium| {
                medium.remove(&path)?;
                medium.sync_dir(TRACES)
            });
        }
        Ok(sound)
    }
}
