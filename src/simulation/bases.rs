//! Operations on bases: pin, hydrate, evict, refuse, accept.

use super::copies::{Copies, CopyResult};
use super::model::{Interruption, Names};
use super::operation::Op;
use super::sim_store::{Outcome, SimStore, text};

impl SimStore {
    pub(super) fn copies(&self) -> &Copies {
        self.copies.as_ref().expect("open")
    }

    /// Runs an operation that changes a base's options, blocks or refusal.
    pub(super) fn change_base(&self, op: &Op, name: &str) -> Result<Outcome, String> {
        let before = self.hook.model.lock().names.clone();
        let source = before.bases[name].source;
        let node = self.store().base(name).map_err(text)?;
        let mut after = before.clone();
        let base = after.bases.get_mut(name).expect("in the model");
        let wants_all = |names: &Names| {
            names.bases.values().any(|base| base.source == source && (base.pinned || base.hydrate))
        };
        let result = match op {
            Op::Pin { pinned, .. } => {
                base.pinned = *pinned;
                self.hook.model.lock().alternatives = vec![after.clone()];
                let noted = node.set_options(|options| options.pinned = *pinned).map(drop);
                self.copies().pin(source, wants_all(&after));
                noted
            }
            Op::Unhydrate { .. } => {
                (base.hydrate, base.kept) = (false, false);
                self.hook.model.lock().alternatives = vec![after.clone()];
                if !after.kept().contains(&source) {
                    self.copies().put_back(source);
                }
                let noted = node.set_options(|options| options.hydrate = false).map(drop);
                node.detach();
                self.copies().pin(source, wants_all(&after));
                noted
            }
            Op::Hydrate { .. } => {
                let was_kept = base.kept;
                (base.hydrate, base.kept) = (true, false);
                self.hook.model.lock().alternatives = vec![after.clone()];
                if let Err(error) = node.set_options(|options| options.hydrate = true) {
                    return Ok(Outcome::Failed(error.to_string()));
                }
                match self.copies().keep(&node, source) {
                    CopyResult::Complete => after.bases.get_mut(name).expect("in the model").kept = true,
                    // An error of the medium. The earlier promise still holds.
                    CopyResult::Failed(why) => {
                        after.bases.get_mut(name).expect("in the model").kept = was_kept;
                        self.hook.model.lock().log.push(format!("  not hydrated: {why}"));
                        let mut model = self.hook.model.lock();
                        (model.names, model.alternatives) = (after, Vec::new());
                        drop(model);
                        let hit = self.hook.fault.lock().hit.is_some();
                        return Ok(if hit { Outcome::Failed(why) } else { Outcome::Done });
                    }
                }
                Ok(())
            }
            Op::Evict { .. } => {
                // Evicted blocks are no longer promised.
                for base in after.bases.values_mut().filter(|base| base.source == source) {
                    base.kept = false;
                }
                self.hook.model.lock().names = after.clone();
                self.copies().put_back(source);
                self.copies().evict(source);
                Ok(())
            }
            Op::Refuse { .. } => {
                base.refused = true;
                self.hook.model.lock().alternatives = vec![after.clone()];
                node.refuse()
            }
            other => unreachable!("{other:?} changes no base"),
        };
        let done = Outcome::of(result);
        if let Outcome::Done = done {
            let mut model = self.hook.model.lock();
            (model.names, model.alternatives) = (after, Vec::new());
        }
        Ok(done)
    }

    /// Serves a base again, and compares its disks with the model, which could not see them meanwhile.
    pub(super) fn accept(&self, name: &str) -> Result<Outcome, String> {
        let mut after = self.hook.model.lock().names.clone();
        after.bases.get_mut(name).expect("in the model").refused = false;
        self.hook.model.lock().alternatives = vec![after.clone()];
        let done = Outcome::of(self.store().base(name).map_err(text)?.accept());
        if let Outcome::Done = done {
            let mut model = self.hook.model.lock();
            (model.names, model.alternatives) = (after, Vec::new());
            let seen = model.clone();
            drop(model);
            // As at a start: a fault in the comparison would prove nothing.
            self.hook.fault.lock().skip = None;
            let now = seen.compare(Interruption::WorkerDeath, self.store())?;
            self.hook.model.lock().names = now.names;
        }
        Ok(done)
    }
}
