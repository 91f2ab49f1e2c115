//! What is asked of the machine: by the command line, the API and tests.

use std::time::Instant;

use devices::acpi::Event as AcpiEvent;

use super::super::event::{Command, ReplyTo};
use super::super::lifecycle::{self, Ending, Refusal, State, Step};
use super::Control;
use super::change::{Change, SAVE, Then};
use super::freeze::Wish;

impl Control {
    pub(super) fn execute(&mut self, command: Command, reply: ReplyTo) {
        let step = match command {
            Command::DeviceStatus { device, answer } => {
                return reply(self.device_status(device, &answer));
            }
            Command::Update { device, message } => return reply(self.update(device, &message)),
            Command::Replace { device, back_end } => return self.replace(device, back_end, reply),
            Command::Status => return reply(Ok(self.state.clone())),
            Command::Thaw { resume, disks } => return self.thaw(resume, disks, reply),
            Command::Quit => {
                self.end_by_will(Ending::Quit);
                return reply(Ok(State::Stopped));
            }
            Command::Pause => Step::Pause,
            Command::Freeze { .. } => Step::Freeze,
            Command::Resume => Step::Resume,
            Command::PowerButton => Step::PowerButton,
            Command::CtrlAltDel => Step::CtrlAltDel,
        };
        if let Err(refusal) = lifecycle::check(&self.state, step) {
            return reply(Err(refusal));
        }
        let under_way = self.change.as_ref().map(Change::name);
        let frozen = matches!(step, Step::Resume | Step::Freeze) && self.frozen;
        let under_way = under_way.or(frozen.then_some(SAVE));
        if let Some(under_way) = under_way {
            let step = match step {
                Step::Pause => "pause",
                Step::Freeze => "freeze",
                Step::Resume => "resume",
                Step::CtrlAltDel => "ctrl-alt-del",
                Step::PowerButton | Step::Start => "power-button",
            };
            return reply(Err(Refusal::Busy { step, under_way }));
        }
        match command {
            Command::Pause => self.pause(Then::Reply(reply, Instant::now())),
            Command::Freeze { msrs, answer } => {
                let wish = Wish { msrs, answer, reply };
                match self.state {
                    State::Running => self.pause(Then::Freeze(wish)),
                    _ => self.freeze(wish, false),
                }
            }
            Command::Resume => {
                self.go_on();
                reply(Ok(self.state.clone()));
            }
            Command::CtrlAltDel => {
                let pressed = self.machine.control.keyboard.ctrl_alt_del();
                reply(if pressed { Ok(self.state.clone()) } else { Err(Refusal::NoKeyboard) });
            }
            _ => {
                self.machine.control.acpi.raise(AcpiEvent::PowerButton);
                reply(Ok(self.state.clone()));
            }
        }
    }
}
