//! `plyfs base seal`: makes the proof of an image file, without a daemon.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::json;

use super::Global;
use super::error::CliError;
use super::interrupt::Interrupts;
use super::progress::{Progress, Update};
use crate::config::size::format_size;
use crate::format::proof::hex;
use crate::seal::{SealError, Sealed, beside, seal};

pub(super) fn run(global: &Global, image: &Path, out: Option<PathBuf>) -> Result<(), CliError> {
    let out = out.unwrap_or_else(|| beside(image));
    let interrupts = Interrupts::catch();
    let mut progress = Progress::of_short_work(&global.output());
    let total = std::fs::metadata(image).map_or(0, |metadata| metadata.len());
    let title = image.display().to_string();
    let mut signal = None;
    let sealed = seal(image, &out, &mut |done| {
        signal = interrupts.pause(Duration::ZERO);
        let text = format!("{} of {}", format_size(done), format_size(total));
        let update = Update { title: &title, done, total, text, state: "sealing" };
        let object = || json!({"image": title, "state": "sealing", "bytes": done, "total": total});
        signal.is_none() && progress.show(&update, object).is_ok()
    });
    progress.clear();
    let Sealed { proof, size, proof_size, root } = sealed.map_err(|error| match (error, signal) {
        (SealError::Interrupted, Some(signal)) => {
            let message = format!("sealing {title} was interrupted; no proof was made");
            CliError::Interrupted { message, signal }
        }
        (error, _) => CliError::Failed(error.to_string()),
    })?;
    let (blake3, proof) = (hex(&root), proof.display().to_string());
    let value = json!({
        "image": title, "size": size, "blake3": blake3, "proof": proof, "proof_size": proof_size
    });
    global.output().line(&value, |_| format!("{blake3}  {proof}\n"))
}
