//! Operations on bases: how each is kept, and whether it is served.

use super::copies::{Copies, Kept};
use super::model::{Names, Survived};
use super::operation::Op;
use super::world::{Done, World, text};

impl World {
    pub(super) fn copies(&self) -> &Copies {
        self.copies.as_ref().expect("open")
    }

    /// Changes how a base is kept, or whether it is.
    pub(super) fn change_base(&self, op: &Op, name: &str) -> Result<Done, String> {
        let before = self.watch.model.lock().names.clone();
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
                self.watch.model.lock().alternatives = vec![after.clone()];
                let noted = node.set_options(|options| options.pinned = *pinned).map(drop);
                self.copies().pin(source, wants_all(&after));
                noted
            }
            Op::Unhydrate { .. } => {
                (base.hydrate, base.kept) = (false, false);
                self.watch.model.lock().alternatives = vec![after.clone()];
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
                self.watch.model.lock().alternatives = vec![after.clone()];
                if let Err(error) = node.set_options(|options| options.hydrate = true) {
                    return Ok(Done::Failed(error.to_string()));
                }
                match self.copies().keep(&node, source) {
                    Kept::Whole => after.bases.get_mut(name).expect("in the model").kept = true,
                    // An error of the medium; what was promised before still is.
                    Kept::Failed(why) => {
                        after.bases.get_mut(name).expect("in the model").kept = was_kept;
                        self.watch.model.lock().log.push(format!("  not kept: {why}"));
                        let mut model = self.watch.model.lock();
                        (model.names, model.alternatives) = (after, Vec::new());
                        drop(model);
                        let sprung = self.watch.trap.lock().sprung.is_some();
                        return Ok(if sprung { Done::Failed(why) } else { Done::Well });
                    }
                }
                Ok(())
            }
            Op::Evict { .. } => {
                // What may go is promised no more.
                for base in after.bases.values_mut().filter(|base| base.source == source) {
                    base.kept = false;
                }
                self.watch.model.lock().names = after.clone();
                self.copies().put_back(source);
                self.copies().evict(source);
                Ok(())
            }
            Op::Refuse { .. } => {
                base.refused = true;
                self.watch.model.lock().alternatives = vec![after.clone()];
                node.refuse()
            }
            other => unreachable!("{other:?} changes no base"),
        };
        let done = Done::of(result);
        if let Done::Well = done {
            let mut model = self.watch.model.lock();
            (model.names, model.alternatives) = (after, Vec::new());
        }
        Ok(done)
    }

    /// Serves a base again, and looks at what its disks are after what happened meanwhile.
    pub(super) fn accept(&self, name: &str) -> Result<Done, String> {
        let mut after = self.watch.model.lock().names.clone();
        after.bases.get_mut(name).expect("in the model").refused = false;
        self.watch.model.lock().alternatives = vec![after.clone()];
        let done = Done::of(self.store().base(name).map_err(text)?.accept());
        if let Done::Well = done {
            let mut model = self.watch.model.lock();
            (model.names, model.alternatives) = (after, Vec::new());
            let seen = model.clone();
            drop(model);
            let now = seen.compare(Survived::Worker, self.store())?;
            self.watch.model.lock().names = now.names;
        }
        Ok(done)
    }
}
