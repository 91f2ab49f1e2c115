//! Compiles a policy into a classic BPF program, at build time.
//!
//! A policy is text: one system call a line, optionally with a condition on one argument
//! (`ioctl if arg1 == 0xae80`), `#` starts a comment. Several lines for one call are alternatives.
//! An argument is compared by its low 32 bits.
//!
//! Installing a filter costs the kernel time per instruction: it checks, translates and compiles
//! each one, and runs the program for every call number there is, to remember those whose answer
//! does not depend on arguments (kernel/seccomp.c, `seccomp_cache_prepare`). Two filters are part
//! of every boot. So calls with conditions come first, in the policy's order (they alone run the
//! program later, `KVM_RUN` among them), and all others are found by bisection of ranges of
//! numbers. A chain of comparisons, which general compilers write, is three times as long.

use syscalls::Sysno;

/// One instruction of classic BPF: code, jump if true, jump if false, operand
/// (`struct sock_filter`, linux/filter.h).
pub type Instruction = (u16, u8, u8, u32);

// linux/bpf_common.h: class, size and mode of an instruction.
const LOAD_WORD: u16 = 0x20; // BPF_LD | BPF_W | BPF_ABS
const JUMP_IF_EQUAL: u16 = 0x15; // BPF_JMP | BPF_JEQ | BPF_K
const JUMP_IF_AT_LEAST: u16 = 0x35; // BPF_JMP | BPF_JGE | BPF_K
const RETURN: u16 = 0x06; // BPF_RET | BPF_K

// struct seccomp_data (linux/seccomp.h): call number, architecture, instruction pointer, arguments
// of 8 bytes. x86-64 is little endian: the low half of an argument comes first.
const NUMBER_OFFSET: u32 = 0;
const ARCH_OFFSET: u32 = 4;
const ARGUMENTS_OFFSET: u32 = 16;
const ARGUMENT_LEN: u32 = 8;
const ARGUMENTS: u32 = 6;

/// AUDIT_ARCH_X86_64 (linux/audit.h).
const ARCH: u32 = 0xc000_003e;

/// What a program answers (linux/seccomp.h).
pub const ALLOW: u32 = 0x7fff_0000;
/// SECCOMP_RET_KILL_PROCESS: a call of another architecture has other numbers, so nothing could be
/// said of it.
pub const KILL: u32 = 0x8000_0000;
/// SECCOMP_RET_TRAP: raises SIGSYS.
pub const TRAP: u32 = 0x0003_0000;
/// SECCOMP_RET_LOG: logs the call and lets it through.
pub const LOG: u32 = 0x7ffc_0000;

/// A condition: this argument has this value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Condition {
    argument: u32,
    value: u32,
}

/// A policy as read.
#[derive(Debug, Default)]
pub struct Policy {
    /// Numbers of the calls allowed whatever their arguments, ascending.
    always: Vec<u32>,
    /// Calls allowed under one of several conditions, in the order of the text.
    conditional: Vec<(u32, Vec<Condition>)>,
}

impl Policy {
    /// Reads a policy.
    ///
    /// # Errors
    /// A line that is no rule, an unknown call, or two rules that contradict each other: a text with
    /// the number of the line.
    pub fn parse(text: &str) -> Result<Policy, String> {
        let mut policy = Policy::default();
        for (number, line) in (1..).zip(text.lines()) {
            let line = line.split('#').next().unwrap_or_default().trim();
            if !line.is_empty() {
                policy.rule(line).map_err(|what| format!("line {number}: {what}"))?;
            }
        }
        policy.always.sort_unstable();
        Ok(policy)
    }

    /// Allows what `other` allows as well.
    pub fn join(&mut self, other: Policy) {
        self.always.extend(other.always);
        self.always.sort_unstable();
        self.always.dedup();
        for (call, conditions) in other.conditional {
            match self.conditional.iter_mut().find(|(known, _)| *known == call) {
                Some((_, known)) => {
                    let new = conditions.into_iter().filter(|new| !known.contains(new));
                    let new: Vec<_> = new.collect();
                    known.extend(new);
                }
                None => self.conditional.push((call, conditions)),
            }
        }
        let always = &self.always;
        self.conditional.retain(|(call, _)| !always.contains(call));
    }

    fn rule(&mut self, line: &str) -> Result<(), String> {
        let wrong = || "expected `CALL` or `CALL if argN == VALUE`".to_owned();
        let words: Vec<&str> = line.split_whitespace().collect();
        let (name, condition) = match words[..] {
            [name] => (name, None),
            [name, "if", argument, "==", value] => {
                let argument = argument.strip_prefix("arg").and_then(|n| n.parse().ok());
                let value = match value.strip_prefix("0x") {
                    Some(hex) => u32::from_str_radix(hex, 16).ok(),
                    None => value.parse().ok(),
                };
                let argument = argument.filter(|&n: &u32| n < ARGUMENTS).ok_or_else(wrong)?;
                (name, Some(Condition { argument, value: value.ok_or_else(wrong)? }))
            }
            _ => return Err(wrong()),
        };
        let call: Sysno = name.parse().map_err(|()| format!("there is no call `{name}`"))?;
        let call = u32::try_from(call.id()).map_err(|err| err.to_string())?;
        let known = self.conditional.iter_mut().find(|(other, _)| *other == call);
        let always = self.always.contains(&call);
        match (condition, known) {
            (None, None) if !always => self.always.push(call),
            (Some(condition), Some((_, all))) if !all.contains(&condition) => all.push(condition),
            (Some(condition), None) if !always => self.conditional.push((call, vec![condition])),
            _ => return Err(format!("`{name}` is allowed twice, or always and under a condition")),
        }
        Ok(())
    }

    /// Compiles the policy into a program that answers `otherwise` to what it does not list.
    ///
    /// # Errors
    /// The policy allows nothing, or is too large for the jumps of a program.
    pub fn compile(&self, otherwise: u32) -> Result<Vec<Instruction>, String> {
        if self.always.is_empty() {
            return Err("the policy allows no call".to_owned());
        }
        // Built from its end, so that each jump's target is already there.
        let mut code = Backwards::default();
        let allow = code.push((RETURN, 0, 0, ALLOW));
        let deny = code.push((RETURN, 0, 0, otherwise));
        let kill = code.push((RETURN, 0, 0, KILL));

        let mut blocks = Vec::new();
        for (call, conditions) in &self.conditional {
            let mut next = deny;
            for (index, condition) in conditions.iter().enumerate().rev() {
                next = code.jump(JUMP_IF_EQUAL, condition.value, allow, next)?;
                let before = index.checked_sub(1).and_then(|index| conditions.get(index));
                if before.is_none_or(|before| before.argument != condition.argument) {
                    let offset = ARGUMENTS_OFFSET + ARGUMENT_LEN * condition.argument;
                    next = code.push((LOAD_WORD, 0, 0, offset));
                }
            }
            blocks.push((*call, next));
        }

        let mut ranges = vec![(0, deny)];
        for &call in &self.always {
            match ranges.last_mut() {
                // Next to the call before: its range goes on.
                Some(last) if last.0 == call => last.1 = allow,
                _ => ranges.push((call, allow)),
            }
            ranges.push((call + 1, deny));
        }
        ranges.dedup_by(|later, earlier| later.1 == earlier.1);
        let mut next = code.bisect(&ranges)?;
        for &(call, block) in blocks.iter().rev() {
            next = code.jump(JUMP_IF_EQUAL, call, block, next)?;
        }
        // Falls through to what was pushed last.
        code.push((LOAD_WORD, 0, 0, NUMBER_OFFSET));
        let number = code.here();
        code.jump(JUMP_IF_EQUAL, ARCH, number, kill)?;
        code.push((LOAD_WORD, 0, 0, ARCH_OFFSET));
        Ok(code.finish())
    }
}

/// A place in a program: how many instructions there are from it to the end, itself included.
type Place = usize;

/// A program, last instruction first.
#[derive(Default)]
struct Backwards(Vec<Instruction>);

impl Backwards {
    fn here(&self) -> Place {
        self.0.len()
    }

    fn push(&mut self, instruction: Instruction) -> Place {
        self.0.push(instruction);
        self.here()
    }

    fn jump(&mut self, code: u16, k: u32, yes: Place, no: Place) -> Result<Place, String> {
        let distance = |to: Place| {
            u8::try_from(self.here() - to).map_err(|_| "the policy is too large".to_owned())
        };
        let (yes, no) = (distance(yes)?, distance(no)?);
        Ok(self.push((code, yes, no, k)))
    }

    /// Emits a search among ranges that start at the given numbers, in ascending order.
    fn bisect(&mut self, ranges: &[(u32, Place)]) -> Result<Place, String> {
        let (lower, upper) = ranges.split_at(ranges.len() / 2);
        let Some(&(first, place)) = upper.first() else { return Err("no ranges".to_owned()) };
        if lower.is_empty() {
            return Ok(place);
        }
        let upper = self.bisect(upper)?;
        let lower = self.bisect(lower)?;
        self.jump(JUMP_IF_AT_LEAST, first, upper, lower)
    }

    fn finish(mut self) -> Vec<Instruction> {
        self.0.reverse();
        self.0
    }
}

#[cfg(test)]
mod tests {
    use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, SeccompRule};
    use seccompiler::{SeccompCmpArgLen, SeccompCmpOp, SeccompCondition};

    use super::*;

    const POLICIES: [&str; 6] = [
        include_str!("../../../resources/seccomp/main.policy"),
        include_str!("../../../resources/seccomp/vcpu.policy"),
        include_str!("../../../resources/seccomp/io.policy"),
        concat!(
            include_str!("../../../resources/seccomp/io.policy"),
            include_str!("../../../resources/seccomp/sockets.policy")
        ),
        include_str!("../../../resources/seccomp/pool.policy"),
        include_str!("../../../resources/seccomp/api.policy"),
    ];

    /// Runs a program for one call as the kernel does; returns its answer.
    fn run(program: &[Instruction], arch: u32, number: u32, arguments: [u64; 6]) -> u32 {
        let (mut at, mut accumulator) = (0, 0);
        loop {
            let (code, yes, no, k) = program[at];
            at += 1;
            let taken = match code {
                LOAD_WORD => {
                    let index = (k.wrapping_sub(ARGUMENTS_OFFSET) / ARGUMENT_LEN) as usize;
                    accumulator = match k {
                        NUMBER_OFFSET => number,
                        ARCH_OFFSET => arch,
                        _ if k % ARGUMENT_LEN == 0 => arguments[index] as u32,
                        _ => (arguments[index] >> 32) as u32,
                    };
                    continue;
                }
                RETURN => return k,
                JUMP_IF_EQUAL => accumulator == k,
                JUMP_IF_AT_LEAST => accumulator >= k,
                0x05 => {
                    at += k as usize; // BPF_JA, which only seccompiler writes
                    continue;
                }
                other => panic!("unknown instruction {other:#x}"),
            };
            at += usize::from(if taken { yes } else { no });
        }
    }

    /// The same policy by an independent compiler.
    fn reference(policy: &Policy) -> Vec<Instruction> {
        let mut rules = std::collections::BTreeMap::new();
        for &call in &policy.always {
            rules.insert(i64::from(call), Vec::new());
        }
        for (call, conditions) in &policy.conditional {
            let alternatives = conditions.iter().map(|condition| {
                let condition = SeccompCondition::new(
                    condition.argument as u8,
                    SeccompCmpArgLen::Dword,
                    SeccompCmpOp::Eq,
                    u64::from(condition.value),
                );
                SeccompRule::new(vec![condition.unwrap()]).unwrap()
            });
            rules.insert(i64::from(*call), alternatives.collect());
        }
        let arch = std::env::consts::ARCH.try_into().unwrap();
        let filter = SeccompFilter::new(rules, SeccompAction::Trap, SeccompAction::Allow, arch);
        let program: BpfProgram = filter.unwrap().try_into().unwrap();
        program.iter().map(|op| (op.code, op.jt, op.jf, op.k)).collect()
    }

    #[test]
    fn every_call_gets_the_answer_of_an_independent_compiler() {
        for text in POLICIES {
            let policy = Policy::parse(text).unwrap();
            let (ours, theirs) = (policy.compile(TRAP).unwrap(), reference(&policy));
            assert!(ours.len() * 2 < theirs.len(), "{} of {}", ours.len(), theirs.len());
            let same = |number, arguments| {
                let (a, b) =
                    (run(&ours, ARCH, number, arguments), run(&theirs, ARCH, number, arguments));
                assert_eq!(a, b, "call {number} {arguments:x?}");
                a
            };
            let mut allowed = 0;
            for number in (0..1024).chain(0x4000_0000..0x4000_0400).chain([u32::MAX]) {
                allowed += usize::from(same(number, [0; 6]) == ALLOW);
            }
            assert_eq!(allowed, policy.always.len());
            for (call, conditions) in &policy.conditional {
                for condition in conditions {
                    let mut arguments = [0; 6];
                    let argument = &mut arguments[condition.argument as usize];
                    *argument = u64::from(condition.value);
                    assert_eq!(same(*call, arguments), ALLOW);
                    arguments[condition.argument as usize] |= 1 << 40;
                    same(*call, arguments);
                    arguments[condition.argument as usize] ^= 1 << 31;
                    assert_eq!(same(*call, arguments), TRAP);
                }
            }
        }
    }

    #[test]
    fn calls_of_another_architecture_end_the_process() {
        let program = Policy::parse("read").unwrap().compile(LOG).unwrap();
        const I386: u32 = 0x4000_0003;
        assert_eq!(run(&program, I386, 0, [0; 6]), KILL);
        assert_eq!(run(&program, ARCH, 0, [0; 6]), ALLOW);
        assert_eq!(run(&program, ARCH, 1, [0; 6]), LOG);
    }

    #[test]
    fn policies_are_joined() {
        let mut policy = Policy::parse("read\nioctl if arg1 == 1\nprctl if arg0 == 1").unwrap();
        policy.join(
            Policy::parse("read\nwrite\nioctl if arg1 == 2\nioctl if arg1 == 1\nprctl").unwrap(),
        );
        let program = policy.compile(TRAP).unwrap();
        let allowed = |call: Sysno, arguments| run(&program, ARCH, call.id() as u32, arguments);
        for (call, argument, answer) in [
            (Sysno::read, 0, ALLOW),
            (Sysno::write, 0, ALLOW),
            (Sysno::prctl, 7, ALLOW),
            (Sysno::ioctl, 1, ALLOW),
            (Sysno::ioctl, 2, ALLOW),
            (Sysno::ioctl, 3, TRAP),
            (Sysno::open, 0, TRAP),
        ] {
            assert_eq!(allowed(call, [argument; 6]), answer, "{call}");
        }
    }

    #[test]
    fn a_wrong_line_is_named() {
        let cases = [
            ("read\n# fine\n\nraed", "line 4: there is no call `raed`"),
            ("ioctl if arg1 = 3", "line 1: expected `CALL` or `CALL if argN == VALUE`"),
            ("ioctl if arg6 == 3", "line 1: expected `CALL` or `CALL if argN == VALUE`"),
            ("ioctl if arg1 == 0x1_0", "line 1: expected `CALL` or `CALL if argN == VALUE`"),
            ("read\nread", "line 2: `read` is allowed twice, or always and under a condition"),
            (
                "read if arg0 == 1\nread",
                "line 2: `read` is allowed twice, or always and under a condition",
            ),
        ];
        for (text, expected) in cases {
            assert_eq!(Policy::parse(text).unwrap_err(), expected);
        }
        assert_eq!(
            Policy::parse("").unwrap().compile(TRAP).unwrap_err(),
            "the policy allows no call"
        );
    }
}
