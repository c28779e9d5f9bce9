//! What readers are to be told, until there is time to: waking them takes longer than planning a step, and a GPU would wait.

use tokio::sync::mpsc::{OwnedPermit, Sender};

use super::request::Event;

/// Events whose room in their readers' channels is taken.
#[derive(Debug, Default)]
pub(super) struct Outbox(Vec<(OwnedPermit<Event>, Event)>);

impl Outbox {
    /// Takes the room for `event`. Without it, or if nobody listens, the event is dropped: room is checked when a step is planned.
    pub(super) fn push(&mut self, reply: &Sender<Event>, event: Event) {
        if let Ok(permit) = reply.clone().try_reserve_owned() {
            self.0.push((permit, event));
        }
    }

    /// Sends everything, in order.
    pub(super) fn tell(&mut self) {
        for (permit, event) in self.0.drain(..) {
            permit.send(event);
        }
    }
}
